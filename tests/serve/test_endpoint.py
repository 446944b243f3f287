"""What comes back over HTTP: the checkpoint's answers whoever else is asking, and errors that say what was wrong."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from banjoray.config.job import JobConfig
from banjoray.errors import ConfigError, RegistryError
from banjoray.serving.app import read_config, serving
from banjoray.serving.security import add_key
from factories import sample_rows
from pages import wait_until
from serve.trained import Shelf, free_port, plain_scores, stock

TEXT = "the whole evening was a lovely surprise"
# From one word to far beyond the 40 tokens of the job, so that any batch of them needs padding.
TEXTS = ["joy", *(row["text"] for row in sample_rows("test")[:58]), "i am so happy " * 30]
MAX_ROWS = 64
BOUND = 1e-5

CLOSED = {"name": "closed", "route_prefix": "/closed"}

Answer = list[dict[str, Any]]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, lively_job: Callable[..., JobConfig]) -> Shelf:
    return stock(tmp_path_factory.mktemp("serve"), lively_job)


@pytest.fixture(scope="module")
def url(shelf: Shelf, request: pytest.FixtureRequest) -> Iterator[str]:
    """An endpoint whose batches are small enough that 60 rows need several."""
    request.getfixturevalue("local_ray")
    file = shelf.config(max_rows=MAX_ROWS, max_body_mib=0.0625, max_batch_tokens=512, latency_target_ms=60_000)
    closed = yaml.safe_load(shelf.config("closed.yaml", api_keys=str(shelf.folder / "keys.yaml")).read_text())
    add_key(shelf.folder / "keys.yaml", "nobody")
    tree = yaml.safe_load(file.read_text())
    tree["applications"] += [application | CLOSED for application in closed["applications"]]
    file.write_text(yaml.safe_dump(tree))
    with serving(file, free_port(), lambda line: None) as address:
        # The alias moves as soon as the endpoint is up: nothing below may notice.
        shelf.registry.promote("tiny", 2, "production")
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def expected(shelf: Shelf) -> list[dict[str, float]]:
    """The scores of TEXTS by a plain forward pass of each."""
    return plain_scores(shelf.folder / "registry/tiny/1", TEXTS)


def ask(client: httpx.Client, inputs: Any, **parameters: Any) -> list[Answer]:
    response = client.post("/models/tiny", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    answers: list[Answer] = response.json()
    return answers


def scores(answer: Answer) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in answer}


def assert_same(answers: list[Answer], expected: list[dict[str, float]]) -> None:
    assert len(answers) == len(expected)
    for answer, wanted in zip(answers, expected, strict=True):
        assert scores(answer) == pytest.approx(wanted, abs=BOUND)


def test_hugging_face_client_gets_label_and_score_of_the_checkpoint(
    url: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    import huggingface_hub.constants

    # The job is offline and says so for the whole process; this client talks to this machine.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    told = huggingface_hub.InferenceClient(model=f"{url}/models/tiny").text_classification(TEXT)
    (wanted,) = plain_scores(shelf.folder / "registry/tiny/1", [TEXT])
    assert {entry.label: entry.score for entry in told} == pytest.approx(wanted, abs=BOUND)
    assert told[0].label == max(wanted, key=wanted.__getitem__)


def test_answers_differ_from_text_to_text_and_from_version_to_version(
    shelf: Shelf, expected: list[dict[str, float]]
) -> None:
    other = plain_scores(shelf.folder / "registry/tiny/2", TEXTS)
    label = next(iter(expected[0]))
    assert max(row[label] for row in expected) - min(row[label] for row in expected) > 100 * BOUND
    assert max(abs(row[label] - theirs[label]) for row, theirs in zip(expected, other, strict=True)) > 100 * BOUND


def test_padding_without_its_mask_would_change_these_answers(shelf: Shelf, expected: list[dict[str, float]]) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = shelf.folder / "registry/tiny/1"
    batch = AutoTokenizer.from_pretrained(folder)(
        TEXTS, truncation=True, max_length=40, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = AutoModelForSequenceClassification.from_pretrained(folder).eval()(batch["input_ids"]).logits
    wanted = torch.tensor([list(row.values()) for row in expected])
    assert float((logits.softmax(-1) - wanted).abs().max()) > 100 * BOUND


def test_one_text_gets_all_labels_by_falling_score(client: httpx.Client, shelf: Shelf) -> None:
    answers = ask(client, TEXT)
    assert_same(answers, plain_scores(shelf.folder / "registry/tiny/1", [TEXT]))
    found = [entry["score"] for entry in answers[0]]
    assert found == sorted(found, reverse=True)
    assert sum(found) == pytest.approx(1)


def test_root_path_answers_as_the_models_own_path(client: httpx.Client) -> None:
    assert client.post("/", json={"inputs": TEXT}).json() == ask(client, TEXT)


def test_pairs_are_answered_as_pairs(client: httpx.Client, shelf: Shelf) -> None:
    pairs = [("what a day", "i was so afraid"), ("i was so afraid", "what a day")]
    wanted = plain_scores(shelf.folder / "registry/tiny/1", pairs)
    assert_same(ask(client, [{"text": text, "text_pair": pair} for text, pair in pairs]), wanted)
    assert_same(ask(client, {"text": pairs[0][0], "text_pair": pairs[0][1]}), wanted[:1])
    alone = ask(client, {"text": "what a day", "text_pair": None})
    assert alone == ask(client, "what a day")
    assert scores(alone[0]) != pytest.approx(wanted[0], abs=BOUND)


@pytest.mark.parametrize("top_k", [1, 3, 100, None])
def test_top_k_cuts_the_list_after_the_best(client: httpx.Client, top_k: int | None) -> None:
    (whole,) = ask(client, TEXT)
    (answer,) = ask(client, TEXT, top_k=top_k)
    assert answer == whole[:top_k]


def test_function_to_apply_is_applied(client: httpx.Client) -> None:
    import numpy as np

    found = {name: scores(ask(client, TEXT, function_to_apply=name)[0]) for name in ("none", "sigmoid", "softmax")}
    logits = np.array([found["none"][label] for label in found["softmax"]])
    softmax = np.exp(logits) / np.exp(logits).sum()
    assert list(found["softmax"].values()) == pytest.approx(softmax, abs=BOUND)
    assert [found["sigmoid"][label] for label in found["softmax"]] == pytest.approx(
        1 / (1 + np.exp(-logits)), abs=BOUND
    )


def test_rows_asked_one_by_one_get_the_checkpoints_answers(
    client: httpx.Client, expected: list[dict[str, float]]
) -> None:
    assert_same([ask(client, text)[0] for text in TEXTS], expected)


@pytest.mark.parametrize("turned", [False, True])
def test_rows_asked_together_get_the_same_answers_in_their_order(
    client: httpx.Client, expected: list[dict[str, float]], turned: bool
) -> None:
    step = -1 if turned else 1
    assert_same(ask(client, TEXTS[::step]), expected[::step])


@pytest.mark.parametrize("size", [1, 7])
def test_rows_asked_by_sixteen_threads_at_once_get_the_same_answers(
    url: str, expected: list[dict[str, float]], size: int
) -> None:
    parts = [slice(start, start + size) for start in range(0, len(TEXTS), size)] * (2 if size > 1 else 1)
    with httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda part: ask(client, TEXTS[part]), parts))
    for part, answer in zip(parts, answers, strict=True):
        assert_same(answer, expected[part])


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"", 400, "the body is not JSON"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b"[" * 5000, 400, "the body is not JSON"),
        (b"[]", 422, "the body holds list"),
        (b'{"text": "a"}', 422, "keys ['text']"),
        (b'{"inputs": []}', 422, "inputs: an empty list"),
        (b'{"inputs": 5}', 422, "inputs: found int"),
        (b'{"inputs": null}', 422, "inputs: found NoneType"),
        (b'{"inputs": ""}', 422, "inputs.text: found nothing but blanks"),
        (b'{"inputs": ["a", " "]}', 422, "inputs[1].text: found nothing but blanks"),
        (b'{"inputs": ["a", ["b"]]}', 422, "inputs[1]: found list"),
        (b'{"inputs": {"text": "a", "pair": "b"}}', 422, "inputs: found keys ['pair', 'text']"),
        (b'{"inputs": {"text": "a", "text_pair": 3}}', 422, "inputs.text_pair: found int"),
        (b'{"inputs": "a", "parameters": [1]}', 422, "parameters: found list"),
        (b'{"inputs": "a", "parameters": {"top_k": 0}}', 422, "parameters.top_k: found 0"),
        (b'{"inputs": "a", "parameters": {"top_k": true}}', 422, "parameters.top_k: found True"),
        (b'{"inputs": "a", "parameters": {"topk": 1}}', 422, "parameters: unknown ['topk']"),
        (b'{"inputs": "a", "parameters": {"function_to_apply": "relu"}}', 422, "function_to_apply: found 'relu'"),
    ],
)
def test_request_that_cannot_be_answered_is_told_what_was_wrong(
    client: httpx.Client, body: bytes, status: int, says: str
) -> None:
    response = client.post("/models/tiny", content=body)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    assert says in response.json()["error"]


def test_wrong_row_does_not_spoil_the_answers_of_others(client: httpx.Client, expected: list[dict[str, float]]) -> None:
    with ThreadPoolExecutor(8) as threads:
        wrong = [threads.submit(client.post, "/models/tiny", json={"inputs": [text, ""]}) for text in TEXTS[:20]]
        right = [threads.submit(ask, client, text) for text in TEXTS[:20]]
    assert {response.result().status_code for response in wrong} == {422}
    assert_same([answer.result()[0] for answer in right], expected[:20])


def test_unknown_model_is_404_and_names_the_one_that_is_served(client: httpx.Client) -> None:
    response = client.post("/models/other", json={"inputs": TEXT})
    assert response.status_code == 404
    assert response.json() == {"error": "model: found 'other'; this endpoint serves 'tiny' ('tiny@1')"}


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", "/nothing", 404, "GET /nothing: Not Found"),
        ("POST", "/models/tiny/more", 404, "POST /models/tiny/more: Not Found"),
        ("PUT", "/models/tiny", 405, "PUT /models/tiny: Method Not Allowed"),
        ("DELETE", "/", 405, "DELETE /: Method Not Allowed"),
        ("POST", "/healthz", 405, "POST /healthz: Method Not Allowed"),
    ],
)
def test_wrong_path_or_method_is_told_in_json(
    client: httpx.Client, method: str, path: str, status: int, says: str
) -> None:
    response = client.request(method, path)
    assert (response.status_code, response.json()) == (status, {"error": says})


def test_too_many_rows_are_refused(client: httpx.Client) -> None:
    assert len(ask(client, ["a"] * MAX_ROWS, top_k=1)) == MAX_ROWS
    response = client.post("/", json={"inputs": ["a"] * (MAX_ROWS + 1)})
    assert response.status_code == 413
    assert response.json() == {"error": "inputs: found 65 rows; this endpoint takes 64 in one request"}


@pytest.mark.parametrize("declared", [True, False])
def test_too_large_a_body_is_refused_whether_its_length_is_declared_or_not(
    client: httpx.Client, declared: bool
) -> None:
    limit = 2**16
    fits, too_large = (b'{"inputs": "' + b"a" * (size - 14) + b'"}' for size in (limit, limit + 1))
    for body, status in ((fits, 200), (too_large, 413)):
        content = body if declared else iter([body[:1000], body[1000:]])
        response = client.post("/", content=content)
        assert ("content-length" in response.request.headers) == declared
        assert response.status_code == status
    assert response.json() == {"error": "the body is larger than 0.0625 MiB"}


def test_every_answer_names_its_version_and_run_though_the_alias_has_moved(
    client: httpx.Client, shelf: Shelf, expected: list[dict[str, float]]
) -> None:
    assert shelf.registry.resolve("tiny@production").version == 2
    for response in (client.post("/", json={"inputs": TEXTS[1]}), client.get("/")):
        assert (response.headers["x-model-version"], response.headers["x-run-id"]) == ("tiny@1", "first")
    assert_same(ask(client, TEXTS[1]), expected[1:2])


def test_root_tells_what_is_served(client: httpx.Client, shelf: Shelf) -> None:
    version = shelf.registry.resolve("tiny@1")
    told = client.get("/").json()
    assert client.get("/models/tiny").json() == told
    assert told == {
        "model": "tiny",
        "version": 1,
        "task": "text-classification",
        "labels": list(version.labels),
        "metrics": dict(version.metrics),
        "lineage": dict(version.lineage),
        "engine": {"engine": "torch", "precision": "fp32", "why": "asked for", "measured_ms": {}, "border": 0.0},
        "shares": {},
        "rollout": {"production": "tiny@1"},
    }


def test_health_and_documentation_answer(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    docs = client.get("/docs")
    assert docs.status_code == 200
    assert "/openapi.json" in docs.text


def test_other_protocols_answer_what_hugging_faces_does(client: httpx.Client, shelf: Shelf) -> None:
    (answer,) = ask(client, TEXT)
    listed = client.get("/v1/models")
    assert [model["id"] for model in listed.json()["data"]] == ["tiny"]
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}
    label, score, _ = client.post("/v2/models/tiny/infer", json={"inputs": [tensor]}).json()["outputs"]
    assert (label["data"], score["data"]) == ([answer[0]["label"]], [pytest.approx(answer[0]["score"], abs=BOUND)])
    predicted = client.post("/predict", json={"inputs": TEXT})
    assert scores(predicted.json()) == pytest.approx(scores(answer), abs=BOUND)
    assert client.get("/info").json()["model_sha"] == shelf.registry.resolve("tiny@1").digest
    assert predicted.headers["x-model-version"] == "tiny@1"
    refused = client.post("/v1/embeddings", json={"input": TEXT})
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


def test_openapi_documents_both_ways_to_ask(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/", "/models/{name}"):
        documented = paths[path]["post"]
        body = documented["requestBody"]["content"]["application/json"]["schema"]
        assert set(body["properties"]) == {"inputs", "parameters", "stream"}
        assert {"200", "400", "404", "413", "422"} <= set(documented["responses"])
        assert set(documented["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert [entry["name"] for entry in paths["/models/{name}"]["post"]["parameters"]] == ["name"]


def test_an_application_with_keys_beside_one_without_asks_for_them_everywhere_but_at_health(
    client: httpx.Client, shelf: Shelf
) -> None:
    key = {"authorization": f"Bearer {add_key(shelf.folder / 'keys.yaml', 'alice')}"}
    for method, path in (("POST", "/closed/"), ("POST", "/closed/models/tiny"), ("GET", "/closed/metrics")):
        refused = client.request(method, path, json={"inputs": TEXT}, headers={"authorization": "Bearer wrong"})
        assert (refused.status_code, refused.json()) == (401, {"error": "this key is not known here"})
    assert client.get("/closed/healthz").json() == {"status": "ok"}
    for _ in range(100):
        # The file is read again while requests come.
        if client.get("/closed/metrics", headers=key).status_code == 200:
            break
        time.sleep(0.1)
    opened = client.post("/closed/models/tiny", json={"inputs": TEXT}, headers=key)
    assert opened.status_code == 200
    assert {entry["label"] for entry in opened.json()[0]} == set(scores(ask(client, TEXT)[0]))


def test_the_playground_is_at_every_application_and_a_browser_is_asked_for_its_key(
    client: httpx.Client, shelf: Shelf
) -> None:
    page = client.get("/ui")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert client.get("/ui/app.js").status_code == 200
    assert client.get("/ui/about").json()["cells"] == ["text"]
    refused = client.get("/closed/ui")
    assert (refused.status_code, refused.headers["www-authenticate"].split()[0]) == (401, "Basic")
    key = add_key(shelf.folder / "keys.yaml", "bob")
    wait_until(lambda: client.get("/closed/ui", auth=("", key)).status_code == 200)
    assert client.get("/closed/ui/about", auth=("", key)).json()["keys"] is True
    asked = client.post("/closed/models/tiny", json={"inputs": TEXT}, auth=("", key))
    assert (asked.status_code, asked.headers["x-tokens"]) == (200, "9")


def test_a_request_keeps_its_id_and_is_told_its_times_and_a_new_one_gets_one(client: httpx.Client) -> None:
    told = client.post("/", json={"inputs": TEXT}, headers={"x-request-id": "mine-1"})
    assert told.headers.get_list("x-request-id") == ["mine-1"]
    assert [part.partition(";")[0] for part in told.headers["server-timing"].split(", ")] == [
        "encode",
        "queue",
        "forward",
        "total",
    ]
    (made,) = client.post("/", json={"inputs": TEXT}).headers.get_list("x-request-id")
    assert len(made) >= 32


def test_a_line_per_request_is_in_rays_file_of_the_replicas_stderr(client: httpx.Client) -> None:
    from ray._private import worker

    node: Any = worker._global_node
    logs = Path(node.get_logs_dir_path())
    assert client.post("/", json={"inputs": TEXT}, headers={"x-request-id": "a-line-of-its-own"}).status_code == 200
    deadline = time.monotonic() + 60
    while True:
        files = logs.glob("worker-*.err")
        lines = [line for file in files for line in file.read_text().splitlines() if "a-line-of-its-own" in line]
        if lines:
            break
        assert time.monotonic() < deadline
    (line,) = map(json.loads, lines)
    assert (line["route"], line["status"], line["version"]) == ("/", 200, "tiny@1")
    assert TEXT not in lines[0]


def test_metrics_of_the_replica_name_it_and_its_version(client: httpx.Client) -> None:
    ask(client, TEXT)
    text = client.get("/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith("banjoray_model_info{")]
    assert 'version="tiny@1"' in line
    assert 'run="first"' in line
    assert "replica=" in line


def told(client: httpx.Client, series: str) -> float:
    """The sum of a metric's samples, as the replica has them now."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(series + "{"))


def test_rows_of_clients_that_hang_up_are_not_computed(client: httpx.Client, url: str) -> None:
    clients, body = 40, b'{"inputs": ["' + b'", "'.join([b"i am so happy " * 30] * MAX_ROWS) + b'"]}'
    head = f"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    before = told(client, "banjoray_batch_rows_sum")
    sockets = [socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) for _ in range(clients)]
    for link in sockets:
        link.sendall(head + body)
    waiting = until(lambda: told(client, "banjoray_queued_rows"), lambda rows: rows > MAX_ROWS)
    computed = told(client, "banjoray_batch_rows_sum") - before
    for link in sockets:
        link.close()
    until(lambda: told(client, "banjoray_queued_rows"), lambda rows: rows == 0)
    # Rows waited: had the clients stayed, all of them would have been computed.
    assert computed + waiting <= clients * MAX_ROWS
    assert told(client, "banjoray_batch_rows_sum") - before < clients * MAX_ROWS
    assert 'status="499"' in client.get("/metrics").text
    assert len(ask(client, TEXT)) == 1


def until(look: Callable[[], float], good: Callable[[float], bool]) -> float:
    """What is seen once it is good; it has half a minute."""
    for _ in range(600):
        if good(seen := look()):
            return seen
        time.sleep(0.05)
    raise AssertionError(f"still {seen}")


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to start Ray or Serve fails the test."""
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.setattr("ray.serve.start", lambda **_: pytest.fail("Serve was started"))


@pytest.mark.usefixtures("no_start")
def test_port_in_use_is_refused_before_anything_starts(shelf: Shelf) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} can't be used .*--port"),
            _serving(shelf.config(), port),
        ):
            pass


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model": "tinny@production"}, RegistryError, r"no model 'tinny'.*Did you mean 'tiny'\?"),
        ({"model": "tiny@9"}, RegistryError, r"tiny: no version 9; it has 1, 2"),
        ({"model": "tiny@staging"}, RegistryError, r"no alias 'staging'"),
        ({"modle": "tiny"}, ConfigError, r"unknown key 'modle'; did you mean 'model'\?"),
        ({"max_rows": 0}, ConfigError, r"max_rows: found 0"),
        ({"engine": "tensorflow"}, ConfigError, r"engine: found 'tensorflow'"),
        ({"engine": "onnx", "precision": "bf16"}, ConfigError, r"precision: found bf16 with engine: onnx"),
        ({"max_batch_tokens": "many"}, ConfigError, r"max_batch_tokens: found 'many'"),
    ],
)
def test_config_that_cannot_be_served_is_refused_before_anything_starts(
    shelf: Shelf, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says), _serving(shelf.config("wrong.yaml", **changes), free_port()):
        pass


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_host_that_others_reach_is_refused_without_keys_before_anything_starts(
    shelf: Shelf, host: str, tmp_path: Path
) -> None:
    file, keys = shelf.config("open.yaml"), tmp_path / "keys.yaml"
    add_key(keys, "alice")
    tree = yaml.safe_load(file.read_text()) | {"http_options": {"host": host}}
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"args\.api_keys: missing.*banjoray keys new"), _serving(file, free_port()):
        pass
    for said in ("none", str(keys)):
        tree["applications"][0]["args"]["api_keys"] = said
        file.write_text(yaml.safe_dump(tree))
        (application,) = read_config(file, None).applications
        assert application.args["api_keys"] == said


@pytest.mark.usefixtures("no_start")
def test_file_that_is_no_serve_config_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("applications: [{name: tiny, import_paht: banjoray.serving.app:build}]")
    with pytest.raises(ConfigError, match="not a Ray Serve config"), _serving(file, free_port()):
        pass


def _serving(file: Path, port: int) -> Any:
    return serving(file, port, lambda line: None)
