"""What an endpoint tells: ids, times, metrics, a line per request; and never a text unless it was asked to."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from banjoray.serving.routes import application
from banjoray.serving.telemetry import Record, request_id
from endpoints import Plain, client, endpoint

ROOT = Path(__file__).parents[2]
SECRET = "my diagnosis is nobody's business"


class Seen:
    """Answers to some requests, and the log's lines."""

    def __init__(self, answers: list[httpx.Response], lines: list[str]) -> None:
        self.answers = answers
        self.raw = lines
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def samples(self) -> dict[str, list[Any]]:
        """Every sample of the last answer, by its name."""
        found: dict[str, list[Any]] = {}
        for family in text_string_to_metric_families(self.answers[-1].text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample)
        return found


def seen(patch: pytest.MonkeyPatch, engine: Any, asks: list[dict[str, Any]], **args: Any) -> Seen:
    """What came of some requests, one after the other, and of GET /metrics."""
    replica = endpoint(patch, engine, **args)
    lines: list[str] = []
    replica.telemetry._write = lines.append

    async def scene() -> list[httpx.Response]:
        async with client() as http:
            asked = [{"method": "POST", "url": "/"} | one for one in asks]
            return [await http.request(**one) for one in (*asked, {"method": "GET", "url": "/metrics"})]

    return Seen(asyncio.run(scene()), lines)


def test_a_request_is_answered_with_its_times_and_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seen(monkeypatch, Plain(), [{"json": {"inputs": ["a b", "c"]}}])
    answer = found.answers[0]
    names = ("encode", "queue", "forward", "total")
    assert re.fullmatch(", ".join(rf"{name};dur=\d+\.\d" for name in names), answer.headers["server-timing"])
    times = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert sum(float(times[name]) for name in names[:3]) <= float(times["total"]) + 0.2
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    assert found.answers[1].headers["server-timing"].startswith("total;dur=")


@pytest.mark.parametrize("given", [b"", b"a b", b"x" * 129, b"a\xff", b"<b>", b"a,b"])
def test_an_id_that_is_no_plain_word_is_replaced(given: bytes) -> None:
    name, new = request_id([(b"x-request-id", given)])
    assert new
    assert re.fullmatch(r"[0-9a-f]{32}", name)


def test_an_id_that_came_with_a_request_is_kept() -> None:
    assert request_id([(b"X-Request-ID", b"ab-1.c_d:9")]) == ("ab-1.c_d:9", False)


def test_a_line_tells_what_came_of_a_request_and_none_of_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    asks: list[dict[str, Any]] = [
        {"json": {"inputs": [SECRET, "two words"]}, "headers": {"x-request-id": "mine"}},
        {"json": {"inputs": SECRET, "parameters": {"function_to_apply": SECRET}}},
        {"json": {"inputs": SECRET}, "url": f"/models/{SECRET}"},
        {"content": SECRET},
        {"method": "GET", "url": f"/{SECRET}"},
    ]
    found = seen(monkeypatch, Plain(), asks)
    assert SECRET not in "".join(found.raw)
    assert "diagnosis" not in "".join(found.raw)
    first = found.lines[0]
    assert set(first) == {"time", "request_id", "route", "status", "ms", "rows", "tokens", "version"}
    assert (first["request_id"], first["route"], first["status"]) == ("mine", "/", 200)
    assert (first["rows"], first["tokens"], first["version"]) == (2, 7, "tiny@1")
    assert [(line["status"], line["route"], line["error"]) for line in found.lines[1:5]] == [
        (422, "/", "wrong_shape"),
        (404, "/models/{name}", "not_found"),
        (400, "/", "not_json"),
        (404, "none", "not_found"),
    ]


def test_texts_are_logged_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seen(monkeypatch, Plain(), [{"json": {"inputs": SECRET}}], log_texts=True)
    assert found.lines[0]["texts"] == [{"text": SECRET}]


def test_lines_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(monkeypatch, Plain(), [{"json": {"inputs": "a"}}], access_log=False).lines == []


@pytest.mark.parametrize("told", [False, True])
def test_a_bug_is_answered_in_json_and_logged_with_its_place_and_without_its_message(
    monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    engine = Plain()
    engine.error = KeyError(SECRET)
    found = seen(monkeypatch, engine, [{"json": {"inputs": "a"}}], log_texts=told)
    answer = found.answers[0]
    assert answer.status_code == 500
    assert SECRET not in answer.text
    bug, line = found.lines[:2]
    assert (bug["exception"], line["status"], line["error"]) == ("KeyError", 500, "internal")
    assert bug["request_id"] == line["request_id"] == answer.headers["x-request-id"]
    assert bug["request_id"] in answer.json()["error"]
    assert any("endpoints.py" in frame for frame in bug["at"])
    assert (SECRET in "".join(found.raw)) == told


def test_metrics_count_requests_batches_and_errors_of_this_replica_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    asks: list[dict[str, Any]] = [{"json": {"inputs": ["a b c d", "a"]}}, {"json": {"inputs": "a b"}}, {"content": "{"}]
    found = seen(monkeypatch, Plain(), asks)
    samples = found.samples()
    assert found.answers[-1].headers["content-type"].startswith("text/plain")
    assert {sample.labels["replica"] for all_of_one in samples.values() for sample in all_of_one} == {"r1"}

    def value(name: str, **labels: str) -> float:
        (sample,) = [one for one in samples[name] if one.labels == labels | {"replica": "r1"}]
        return float(sample.value)

    assert value("banjoray_requests_total", route="/", status="200", version="tiny@1") == 2
    assert value("banjoray_requests_total", route="/", status="400", version="tiny@1") == 1
    assert value("banjoray_errors_total", kind="not_json") == 1
    assert value("banjoray_request_seconds_count", route="/", version="tiny@1") == 3
    for name in ("encode", "queue", "forward"):
        assert value(f"banjoray_{name}_seconds_count") == 2
    assert (value("banjoray_batch_rows_sum"), value("banjoray_batch_tokens_sum")) == (3, 10)
    # Of eight tokens in the first batch three are padding; in the second none is.
    assert value("banjoray_batch_padding_share_sum") == pytest.approx(3 / 8)
    assert value("banjoray_queued_rows") == 0
    assert value("banjoray_model_info", model="tiny", version="tiny@1", run="first", role="production") == 1


def test_paths_that_are_not_ours_make_no_series_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asks: list[dict[str, Any]] = [{"method": "GET", "url": f"/{number}"} for number in range(20)]
    found = seen(monkeypatch, Plain(), asks)
    (sample,) = [one for one in found.samples()["banjoray_requests_total"] if one.labels["status"] == "404"]
    assert sample.value == 20


def test_a_record_of_a_request_that_computed_nothing_tells_its_total() -> None:
    assert re.fullmatch(r"total;dur=\d+\.\d", Record("a").server_timing())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of all metrics, without what Prometheus makes of each."""
    told = seen(monkeypatch, Plain(), [{"json": {"inputs": "a"}}, {"content": "{"}]).samples()
    return {stem(name) for name in told if not name.endswith("_created")}


def stem(name: str) -> str:
    return re.sub(r"_(bucket|count|sum)$", "", name)


def test_the_dashboard_shows_every_metric_and_no_other(measured: set[str]) -> None:
    dashboard = json.loads((ROOT / "docs/grafana.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert {stem(name) for query in queries for name in re.findall(r"\bbanjoray_\w+", query)} == measured
    assert len(measured) == 11


def test_the_page_about_safety_tells_every_metric(measured: set[str]) -> None:
    page = (ROOT / "docs/safety.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(banjoray_\w+)`", page)) == measured


def test_a_disk_without_room_for_the_log_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115  closing it raises what it is here for
    monkeypatch.setattr("sys.__stderr__", full)
    replica = endpoint(monkeypatch, Plain())

    async def scene() -> int:
        transport = httpx.ASGITransport(application(lambda: replica))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            # What goes wrong after the answer is raised here.
            return (await http.post("/", json={"inputs": "a"})).status_code

    assert asyncio.run(scene()) == 200
    with pytest.raises(OSError, match="No space left"):
        full.close()
