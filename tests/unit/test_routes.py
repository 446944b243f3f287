"""All protocols at one address: each has its own errors, says what it takes, and no body makes any of them fail."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from banjoray.serving.protocols import huggingface, kserve, openai, tei
from replicas import InProcess, encoder, talker

ERRORS = {
    "/": {"error"},
    "/models/tiny": {"error"},
    "/v1/embeddings": {"error"},
    "/v1/completions": {"error"},
    "/v1/chat/completions": {"error"},
    "/v2/models/tiny/infer": {"error"},
    "/v2/models/tiny/versions/1/infer": {"error"},
    "/embed": {"error", "error_type"},
    "/rerank": {"error", "error_type"},
    "/predict": {"error", "error_type"},
}
DOCS = Path(__file__).parents[2] / "docs/protocols.md"
TASKS = ("text-classification", "feature-extraction", "question-answering", "text-generation")
# What may answer 200 by the task that is served; the rest of the page is for other tasks.
FITTING: dict[str, set[str]] = {
    "text-classification": {"/models/emotion", "/v2/models/emotion/infer", "/predict"},
    "feature-extraction": {"/models/emotion", "/v1/embeddings", "/v2/models/emotion/infer", "/embed", "/rerank"},
    "question-answering": set(),
    "text-generation": {"/models/emotion", "/v1/completions", "/v1/chat/completions", "/v2/models/emotion/infer"},
}
TENSORS = '[{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]'
# Path -> the keys of a request that is right for some task, as JSON.
RIGHT = {
    "/": {"inputs": '"a"', "parameters": "{}", "stream": "false"},
    "/v1/embeddings": {"input": '"a"', "dimensions": "4", "model": '"tiny"'},
    "/v1/completions": {"prompt": '"one"', "stop": '"two"', "stream": "true", "stream_options": "{}"},
    "/v1/chat/completions": {"messages": '[{"role": "user", "content": "one"}]', "temperature": "0", "seed": "1"},
    "/v2/models/tiny/infer": {"inputs": TENSORS, "outputs": "[]", "parameters": "{}", "id": '"7"'},
    "/embed": {"inputs": '"a"', "normalize": "true", "truncate": "true"},
    "/rerank": {"query": '"a"', "texts": '["b"]', "return_text": "true"},
    "/predict": {"inputs": '["a", "b"]', "raw_scores": "true"},
}
VALUES = (
    b'"a"',
    b'" "',
    b'"\\ud800"',
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b'["\\ud800"]',
    b"[]",
    b"{}",
    b'["a", null]',
    b'[["a", "b"], ["c"]]',
    b"[[[[[[]]]]]]",
    b'{"text": "a"}',
    b'[{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["\\ud800"]}]',
    b'[{"role": "user", "content": "\\ud800"}]',
)
BODIES = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"inputs": NaN}',
    b"\xff\xfe",
    b"\x00\x01",
    b"[" * 5000,
    b'{"\\ud800": 1}',
    b'{"' + b"k" * 50_000 + b'": 1}',
    b'{"inputs": ' + b"9" * 10_000 + b"}",
)


@pytest.fixture(scope="module", params=TASKS)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    folder = tmp_path_factory.mktemp("replica")
    engine = talker(folder) if request.param == "text-generation" else encoder(folder, request.param)
    found = InProcess(engine, max_body_mib=0.0625)
    yield found
    found.close()


@pytest.mark.parametrize("path", RIGHT)
def test_no_body_is_answered_with_anything_but_an_answer_or_an_error_of_the_protocol(
    asked: InProcess, path: str
) -> None:
    changed = [RIGHT[path] | {key: value.decode()} for key in RIGHT[path] for value in VALUES]
    bodies = ["{" + ", ".join(f'"{key}": {value}' for key, value in body.items()) + "}" for body in changed]
    refused = 0
    for body in (*BODIES, *(text.encode() for text in bodies)):
        # What the application does not turn into a status is raised here.
        response = asked.request("POST", path, content=body)
        if response.status_code == 200:
            continue
        refused += 1
        assert 400 <= response.status_code < 423, response.text
        assert set(response.json()) == ERRORS[path]
        if path.startswith("/v1/"):
            assert isinstance(response.json()["error"]["message"], str)
    assert refused > len(BODIES)


def test_too_large_a_body_is_refused_in_every_protocol(asked: InProcess) -> None:
    for path, error in ERRORS.items():
        response = asked.request("POST", path, content=b'{"inputs": "' + b"a" * 70_000 + b'"}')
        assert (response.status_code, set(response.json())) == (413, error)


def test_paths_that_are_not_there_are_told_in_the_shape_of_their_protocol(asked: InProcess) -> None:
    for path, where in (("/v1/nothing", ("error", "message")), ("/v2/nothing", ("error",)), ("/nothing", ("error",))):
        response = asked.request("GET", path)
        told = response.json()
        for key in where:
            told = told[key]
        assert (response.status_code, told) == (404, f"GET {path}: Not Found")
    for path, method in (("/embed", "GET"), ("/", "DELETE"), ("/v2", "POST"), ("/v1/models", "POST")):
        response = asked.request(method, path)
        assert (response.status_code, f"{method} {path}: Method Not Allowed" in response.text) == (405, True)
    assert set(asked.request("GET", "/embed").json()) == {"error", "error_type"}


def test_a_prefix_of_all_paths_does_not_change_whose_they_are(asked: InProcess) -> None:
    asked.root = "/tiny"
    try:
        told = asked.request("GET", "/tiny/v1/nothing").json()
        assert set(asked.request("GET", "/tiny/embed").json()) == {"error", "error_type"}
        assert asked.request("GET", "/tiny/v2/models/tiny").status_code == 200
    finally:
        asked.root = ""
    assert told["error"]["message"] == "GET /tiny/v1/nothing: Not Found"


def test_the_document_has_every_route_and_its_errors(asked: InProcess) -> None:
    paths: dict[str, Any] = asked.request("GET", "/openapi.json").json()["paths"]
    for path in ERRORS:
        named = path.replace("tiny", "{name}").replace("versions/1", "versions/{version}")
        documented = paths[named]["post"]
        assert documented["requestBody"]["content"]["application/json"]["schema"]["required"]
        errors = [code for code in documented["responses"] if code != "200"]
        one_by_one = ["400", "401", "404", "408", "413", "422", "429", "504"]
        assert errors == (one_by_one if path in ("/", "/models/tiny") else ["4XX", "504"])
    gets = {path for path, methods in paths.items() if "get" in methods}
    assert {"/", "/healthz", "/info", "/v1/models", "/v2", "/v2/health/ready", "/v2/models/{name}"} <= gets
    for path, methods in paths.items():
        assert not any("HTTPValidationError" in str(method["responses"]) for method in methods.values()), path


def test_every_path_of_a_protocol_has_that_protocols_errors() -> None:
    def none() -> Any:
        raise AssertionError("nobody was asked")

    for protocol in (openai, kserve, tei):
        for route in protocol.routes(none).routes:
            path = str(getattr(route, "path", ""))
            assert any(path == known or (known.endswith("/") and path.startswith(known)) for known in protocol.PATHS)
    others = (*openai.PATHS, *kserve.PATHS, *tei.PATHS)
    for route in huggingface.routes(none).routes:
        assert not str(getattr(route, "path", "")).startswith(others)


def test_the_requests_of_the_page_about_protocols_are_answered(asked: InProcess) -> None:
    shown = re.findall(r"^curl -s http://127\.0\.0\.1:8000(\S+) -d '(.*)'$", DOCS.read_text(encoding="utf-8"), re.M)
    assert {path for path, _ in shown} == set.union(*FITTING.values())
    for path, body in shown:
        known = json.loads(body)
        known |= {"model": "tiny"} if "model" in known else {}
        if path == "/models/emotion" and asked.served.task.name == "feature-extraction":
            # A vector has no best two.
            del known["parameters"]
        response = asked.request("POST", path.replace("emotion", "tiny"), json=known)
        fits = path in FITTING[asked.served.task.name]
        assert (response.status_code == 200) == fits, response.text
