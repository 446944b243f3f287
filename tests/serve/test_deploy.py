"""Another version under traffic: compared, swapped, rolled back; what is refused never answers anybody."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from banjoray.cluster.deploy import Place, deploy, rollback
from banjoray.config.job import JobConfig
from banjoray.config.rollout import Rollout
from banjoray.config.section import validate
from banjoray.config.serve import ServeConfig
from banjoray.errors import ClusterError, ConfigError, GateRefused
from banjoray.serving.app import serving
from commands import BANJORAY
from factories import sample_rows
from serve.trained import Shelf, free_port, plain_scores, stock

TEXTS = [row["text"] for row in sample_rows("test")[:24]]
HERE = ("auto", None)
ANY: dict[str, Any] = {"gate": {"max_drop": 1.0, "max_slowdown": 1000.0}}


def silent(line: str) -> None:
    """Nobody reads it."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, lively_job: Callable[..., JobConfig]) -> Shelf:
    """Versions 1 and 2 as trained; 3 has the rows of its head turned around; a file of 4 is not what it was."""
    shelf = stock(tmp_path_factory.mktemp("deploy"), lively_job)
    for number in (3, 4):
        copy_of_first(shelf)
        assert shelf.registry.versions("tiny")[-1].version == number
    weights = shelf.folder / "registry/tiny/4/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    return shelf


def copy_of_first(shelf: Shelf) -> None:
    """Another version: the first, whose head says everything the other way around."""
    import shutil

    from safetensors.torch import load_file, save_file

    first = shelf.registry.resolve("tiny@1")
    folder = shelf.folder / "turned"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(shelf.folder / "registry/tiny/1", folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    register = shelf.registry.register
    register(
        "tiny", folder, task=first.task, labels=first.labels, lineage=first.lineage, verify=lambda _: first.metrics
    )


@pytest.fixture(scope="module")
def url(shelf: Shelf, request: pytest.FixtureRequest) -> Iterator[str]:
    request.getfixturevalue("local_ray")
    with serving(shelf.config(access_log=False), free_port(), silent) as address:
        yield address


@pytest.fixture(autouse=True)
def first_answers(url: str) -> Iterator[None]:
    """Every test begins with version 1."""
    yield
    assert url
    deploy("tiny@1", "production", ANY, HERE, silent)


def about(url: str) -> Any:
    return httpx.get(url, timeout=60).json()


def best(scores: dict[str, float]) -> str:
    return max(scores, key=scores.__getitem__)


class Traffic:
    """Requests one after the other from some threads, until it is left; every answer is kept."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self.answers: list[tuple[str, int, str | None, str | None]] = []

    @contextmanager
    def going(self, threads: int = 4) -> Iterator["Traffic"]:
        workers = [threading.Thread(target=self._ask) for _ in range(threads)]
        for worker in workers:
            worker.start()
        try:
            yield self
        finally:
            self._stop.set()
            for worker in workers:
                worker.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60, transport=httpx.HTTPTransport(retries=2)) as client:
            while not self._stop.is_set():
                for text in TEXTS:
                    found = client.post("/", json={"inputs": text})
                    label = found.json()[0][0]["label"] if found.status_code == 200 else found.text
                    self.answers.append((text, found.status_code, found.headers.get("x-model-version"), label))

    def wrong(self, shelf: Shelf) -> list[Any]:
        """Answers that are not those of the version that they name."""
        known = {
            f"tiny@{number}": dict(
                zip(TEXTS, map(best, plain_scores(shelf.folder / f"registry/tiny/{number}", TEXTS)), strict=True)
            )
            for number in (1, 2)
        }
        return [each for each in self.answers if each[1] != 200 or known.get(each[2] or "", {}).get(each[0]) != each[3]]


def test_swap_under_load_loses_nothing_and_every_answer_is_of_the_version_that_it_names(url: str, shelf: Shelf) -> None:
    with Traffic(url).going() as traffic:
        found = deploy("tiny@2", "production", ANY, HERE, silent)
        assert about(url)["version"] == 2
        back = rollback("tiny", HERE)
        assert about(url)["version"] == 1
    assert (found.rollout.references, found.before) == (
        {"production": "tiny@2", "previous": "tiny@1"},
        {"production": "tiny@1"},
    )
    assert (found.verdicts[0]["version"], found.verdicts[0]["why"]) == ("tiny@2", "")
    assert back.rollout.references == {"production": "tiny@1", "previous": "tiny@2"}
    assert traffic.wrong(shelf) == []
    assert {"tiny@1", "tiny@2"} == {each[2] for each in traffic.answers}


@pytest.mark.parametrize(
    ("version", "change", "why"),
    [
        ("tiny@3", {}, "its f1_macro is"),
        ("tiny@2", {"gate": {"max_drop": 1.0, "max_slowdown": 0.01}}, "its passes take"),
        ("tiny@4", {}, "it can't be loaded (BrokenVersion"),
    ],
    ids=["worse", "slower", "broken"],
)
def test_a_refused_candidate_says_why_and_never_answers(url: str, version: str, change: Any, why: str) -> None:
    with Traffic(url).going(2) as traffic, pytest.raises(GateRefused) as caught:
        deploy(version, "production", change, HERE, silent)
    assert f"{version} is refused: {why}" in str(caught.value)
    assert {each[1:3] for each in traffic.answers} == {(200, "tiny@1")}
    assert about(url)["rollout"]["production"] == "tiny@1"


def test_a_canary_answers_its_share_by_the_request_id_and_goes_with_a_rollback(url: str) -> None:
    split = {"production": 0.75, "candidate": 0.25}
    deploy("tiny@2", "candidate", ANY | {"traffic": split}, HERE, silent)
    assert about(url)["rollout"] | {"previous": None} == {
        "production": "tiny@1",
        "candidate": "tiny@2",
        "traffic": split,
        "previous": None,
    }
    with httpx.Client(base_url=url, timeout=60) as client:

        def versions() -> list[str]:
            asked = [
                client.post("/", json={"inputs": "what a day"}, headers={"x-request-id": f"r{n}"}) for n in range(200)
            ]
            return [response.headers["x-model-version"] for response in asked]

        first, again = versions(), versions()
        assert first == again
        assert 20 < first.count("tiny@2") < 80
        assert client.post("/v2/models/tiny/versions/2/infer", json=tensor()).json()["model_version"] == "2"
        rollback("tiny", HERE)
        assert set(versions()) == {"tiny@1"}


def tensor() -> dict[str, Any]:
    return {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["what a day"]}]}


def test_a_shadow_answers_nobody_and_its_differences_are_counted_by_label(url: str, shelf: Shelf) -> None:
    deploy("tiny@3", "shadow", {}, HERE, silent)
    with httpx.Client(base_url=url, timeout=60) as client:
        for text in TEXTS:
            assert client.post("/", json={"inputs": text}).headers["x-model-version"] == "tiny@1"
        told = client.get("/").json()["rollout"]["shadow"]
        deadline = time.monotonic() + 60
        while told["rows"] + told["passed_over"] < len(TEXTS):
            assert time.monotonic() < deadline, told
            told = client.get("/").json()["rollout"]["shadow"]
    assert (told["version"], told["failed"]) == ("tiny@3", 0)
    assert 0 < told["differ"] <= told["rows"]
    assert sum(each["differ"] for each in told["by_label"].values()) == told["differ"]
    mine, turned = (plain_scores(shelf.folder / f"registry/tiny/{number}", TEXTS) for number in (1, 3))
    assert any(best(one) != best(other) for one, other in zip(mine, turned, strict=True))


def test_the_commands_do_it_from_another_process(url: str) -> None:
    import ray

    def banjoray(*words: str) -> "subprocess.CompletedProcess[str]":
        address = ["--address", ray.get_runtime_context().gcs_address]
        command = [BANJORAY, *words, *address]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ))

    loose = ("--max-drop", "1", "--max-slowdown", "1000")
    deployed = banjoray("deploy", "tiny@2", *loose, "--json")
    assert deployed.returncode == 0, deployed.stderr
    assert json.loads(deployed.stdout)["rollout"]["production"] == "tiny@2"
    assert about(url)["version"] == 2
    refused = banjoray("deploy", "tiny@4")
    assert (refused.returncode, refused.stdout) == (3, "")
    assert "tiny@4 is refused: it can't be loaded (BrokenVersion" in refused.stderr
    back = banjoray("rollback", "tiny")
    assert back.returncode == 0, back.stderr
    assert back.stdout.startswith("production tiny@1, previous tiny@2; in every replica after ")
    assert about(url)["version"] == 1


def test_a_change_that_others_came_before_is_not_made(url: str) -> None:
    plan = Rollout(production="tiny@2", previous="tiny@1", accepted=("tiny@2",))
    deploy("tiny@3", "shadow", {}, HERE, silent)
    with pytest.raises(ClusterError, match="another change came first: replicas held"):
        Place("tiny", validate(ServeConfig, {"model": "tiny@1"}, "args")).follow("tiny", plan, {"production": "tiny@1"})
    assert about(url)["rollout"]["production"] == "tiny@1"


@pytest.mark.usefixtures("url")
def test_what_is_not_served_here_is_refused() -> None:
    with pytest.raises(ConfigError, match="no application serves other; there are: tiny"):
        deploy("other@1", "production", {}, HERE, silent)
    with pytest.raises(ConfigError, match="no application serves tiny as else"):
        rollback("tiny", ("auto", "else"))
