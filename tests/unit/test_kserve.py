"""The Open Inference Protocol: the answers of Hugging Face's protocol as tensors, in JSON and as binary data."""

import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest

from replicas import LABELS, MAX_ROWS, InProcess, encoder, talker

TEXTS = ["i feel so happy today", "the whole evening was a surprise", "naïve 😀"]
INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    found = InProcess(encoder(tmp_path_factory.mktemp("classifier"), "text-classification"))
    yield found
    found.close()


def tensor(texts: Sequence[str], name: str = "text", **changes: Any) -> dict[str, Any]:
    return {"name": name, "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)} | changes


def elements(texts: Sequence[str | bytes]) -> bytes:
    cells = [text if isinstance(text, bytes) else text.encode() for text in texts]
    return b"".join(struct.pack("<I", len(cell)) + cell for cell in cells)


def infer(asked: InProcess, *inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Output -> its tensor, of a request in JSON."""
    told = asked.post(INFER, {"inputs": list(inputs)} | more)
    return {output.pop("name"): output for output in told["outputs"]}


def binary(asked: InProcess, head: dict[str, Any], data: bytes, length: Any = None) -> httpx.Response:
    start = json.dumps(head).encode()
    header = {"Inference-Header-Content-Length": str(len(start) if length is None else length)}
    return asked.request("POST", INFER, content=start + data, headers=header)


def test_the_server_and_its_model_tell_of_themselves(classifier: InProcess) -> None:
    assert classifier.request("GET", "/v2/health/live").json() == {"live": True}
    assert classifier.request("GET", "/v2/health/ready").json() == {"ready": True}
    server = classifier.request("GET", "/v2").json()
    assert (server["name"], server["extensions"]) == ("banjoray", ["binary_tensor_data"])
    for path in ("/v2/models/tiny", "/v2/models/tiny/versions/1"):
        assert classifier.request("GET", f"{path}/ready").json() == {"name": "tiny", "ready": True}
        assert classifier.request("GET", path).json() == {
            "name": "tiny",
            "versions": ["1"],
            "platform": "banjoray",
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [
                {"name": "label", "datatype": "BYTES", "shape": [-1]},
                {"name": "score", "datatype": "FP32", "shape": [-1]},
                {"name": "scores", "datatype": "FP32", "shape": [-1, 3]},
            ],
        }
    for path in ("/v2/models/other", "/v2/models/tiny/versions/2", "/v2/models/tiny/versions/2/ready"):
        error = classifier.request("GET", path)
        assert error.status_code == 404
        assert list(error.json()) == ["error"]


def test_labels_and_scores_are_those_of_text_classification(classifier: InProcess) -> None:
    expected = classifier.post("/", {"inputs": TEXTS})
    found = infer(classifier, tensor(TEXTS))
    assert found["label"]["data"] == [row[0]["label"] for row in expected]
    assert len(set(found["label"]["data"])) > 1
    assert found["score"]["data"] == np.array([row[0]["score"] for row in expected], np.float32).tolist()
    tables = [{entry["label"]: entry["score"] for entry in row} for row in expected]
    scores = np.array([[table[label] for label in LABELS] for table in tables], np.float32)
    assert (found["scores"]["shape"], found["scores"]["data"]) == ([3, 3], scores.ravel().tolist())
    assert infer(classifier, tensor([], data=[[text] for text in TEXTS], shape=[3, 1])) == found
    pairs = classifier.post("/", {"inputs": [{"text": "happy", "text_pair": "sad"}]})
    pair = infer(classifier, tensor(["happy"]), tensor(["sad"], "text_pair"))
    assert pair["label"]["data"] == [pairs[0][0]["label"]]
    logits = infer(classifier, tensor(TEXTS), parameters={"function_to_apply": "none"})
    assert abs(sum(logits["scores"]["data"][:3]) - 1) > 1e-3


def test_a_request_has_its_name_and_version_back(classifier: InProcess) -> None:
    told = classifier.post("/v2/models/tiny/versions/1/infer", {"id": "7", "inputs": [tensor(["a"])]})
    assert (told["id"], told["model_name"], told["model_version"]) == ("7", "tiny", "1")


def test_binary_tensors_say_what_json_says(classifier: InProcess) -> None:
    expected = infer(classifier, tensor(TEXTS))
    data = elements(TEXTS)
    inputs = [{"name": "text", "shape": [3, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}]
    outputs = [{"name": name, "parameters": {"binary_data": name != "score"}} for name in ("scores", "score", "label")]
    response = binary(classifier, {"inputs": inputs, "outputs": outputs}, data)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/octet-stream")
    length = int(response.headers["inference-header-content-length"])
    scores, score, label = json.loads(response.content[:length])["outputs"]
    assert [scores["name"], score["name"], label["name"]] == ["scores", "score", "label"]
    assert score["data"] == expected["score"]["data"]
    rest = response.content[length:]
    size = scores["parameters"]["binary_data_size"]
    assert np.frombuffer(rest[:size], "<f4").tolist() == expected["scores"]["data"]
    assert rest[size:] == elements(expected["label"]["data"])
    assert label["parameters"]["binary_data_size"] == len(rest) - size
    every = binary(classifier, {"inputs": inputs, "parameters": {"binary_data_output": True}}, data)
    told = json.loads(every.content[: int(every.headers["inference-header-content-length"])])["outputs"]
    assert all("data" not in output for output in told)


def test_other_tasks_answer_vectors_or_json(tmp_path_factory: pytest.TempPathFactory) -> None:
    embedder = InProcess(encoder(tmp_path_factory.mktemp("embedder"), "feature-extraction"))
    vectors = infer(embedder, tensor(TEXTS))["embedding"]
    assert vectors["shape"] == [3, 32]
    assert vectors["data"] == np.array(embedder.post("/", {"inputs": TEXTS}), np.float32).ravel().tolist()
    embedder.close()
    writer = InProcess(talker(tmp_path_factory.mktemp("talker")))
    answer = infer(writer, tensor(["one two", "six"]), parameters={"max_new_tokens": 3})["answer"]
    expected = writer.post("/", {"inputs": ["one two", "six"], "parameters": {"max_new_tokens": 3}})
    assert [json.loads(row) for row in answer["data"]] == expected
    error = writer.request("POST", INFER, json={"inputs": [tensor(["one"])], "parameters": {"stream": True}})
    assert (error.status_code, "parameters.stream" in error.json()["error"]) == (400, True)
    writer.close()


def test_questions_come_with_their_contexts(tmp_path_factory: pytest.TempPathFactory) -> None:
    reader = InProcess(encoder(tmp_path_factory.mktemp("reader"), "question-answering"))
    told = reader.request("GET", "/v2/models/tiny").json()
    assert [entry["name"] for entry in told["inputs"]] == ["question", "context"]
    question, context = "who feels happy", "i feel so happy today and she is sad"
    found = infer(reader, tensor([context], "context"), tensor([question], "question"))["answer"]
    expected = reader.post("/", {"inputs": {"question": question, "context": context}})
    assert [json.loads(row) for row in found["data"]] == [expected]
    error = reader.request("POST", INFER, json={"inputs": [tensor(["a"], "question")]})
    assert (error.status_code, "this model reads question and context" in error.json()["error"]) == (400, True)
    reader.close()


WRONG = [
    ({}, 400, "inputs: found NoneType"),
    ({"inputs": []}, 400, "inputs: found list"),
    ({"inputs": ["a"]}, 400, "inputs[0]: needed an object"),
    ({"inputs": [tensor(["a"]), tensor(["b"])]}, 400, "inputs[1]: needed an object with a name of its own"),
    ({"inputs": [tensor(["a"], "texts")]}, 400, "found ['texts']; this model reads text and text_pair"),
    ({"inputs": [tensor(["a"], "text_pair")]}, 400, "found ['text_pair']"),
    ({"inputs": [tensor(["a"]), tensor(["a", "b"], "text_pair")]}, 400, "unlike lengths"),
    ({"inputs": [tensor(["a"], datatype="FP32")]}, 400, "inputs[0].datatype: found 'FP32'"),
    ({"inputs": [tensor(["a"], shape=[1, 2])]}, 400, "inputs[0].shape: found [1, 2]"),
    ({"inputs": [tensor(["a"], shape=[True])]}, 400, "inputs[0].shape: found [True]"),
    ({"inputs": [tensor(["a"], shape=[0])]}, 400, "inputs[0].shape: found [0]"),
    ({"inputs": [tensor(["a"], shape=[2])]}, 400, "found 1 elements; its shape says 2"),
    ({"inputs": [tensor(["a"], shape=[10**9])]}, 413, "this endpoint takes 8"),
    ({"inputs": [tensor(["a"] * (MAX_ROWS + 1))]}, 413, "found 9 rows"),
    ({"inputs": [tensor(["a"], data=[1])]}, 400, "inputs[0].data: needed a list of texts"),
    ({"inputs": [tensor(["a"], data="a")]}, 400, "inputs[0].data: needed a list of texts"),
    ({"inputs": [tensor(["a", " "])]}, 400, "inputs[1].text: found nothing but blanks"),
    ({"inputs": [tensor(["a"], parameters={"binary_data_size": 5})]}, 400, "binary_data_size: found 5; 0 bytes left"),
    ({"inputs": [tensor(["a"], parameters=[1])]}, 400, "binary_data_size: found [1]"),
    ({"inputs": [tensor(["a"])], "outputs": [{"name": "logits"}]}, 400, "outputs[0]: found 'logits'"),
    ({"inputs": [tensor(["a"])], "outputs": {"name": "label"}}, 400, "outputs: found dict"),
    (
        {"inputs": [tensor(["a"])], "outputs": [{"name": "label", "parameters": {"classification": 2}}]},
        400,
        "only binary_data is known",
    ),
    ({"inputs": [tensor(["a"])], "parameters": {"top_k": 1}}, 400, "parameters.top_k"),
    ({"inputs": [tensor(["a"])], "parameters": {"colour": 1}}, 400, "unknown ['colour']"),
    ({"inputs": [tensor(["a"])], "parameters": [1]}, 400, "parameters: found list"),
    ({"inputs": [tensor(["a"])], "id": 7}, 400, "id: found 7"),
    ({"inputs": [tensor(["a"])], "id": "\ud800"}, 400, "id: found"),
]


@pytest.mark.parametrize(("body", "status", "says"), WRONG)
def test_what_is_wrong_with_a_request_is_named(classifier: InProcess, body: Any, status: int, says: str) -> None:
    response = classifier.request("POST", INFER, content=json.dumps(body))
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    assert says in response.json()["error"]


@pytest.mark.parametrize(
    ("data", "length", "says"),
    [
        (elements(["a"])[:-1], None, "breaks off inside of element 0"),
        (struct.pack("<I", 2**32 - 1) + b"a", None, "breaks off inside of element 0"),
        (b"\x00", None, "breaks off inside of element 0"),
        (elements([b"\xff\xfe"]), None, "element 0 is not UTF-8 (byte 1 of it)"),
        (elements(["a", "b"]), None, "found 2 elements; its shape says 1"),
        (elements(["a"]), 10**6, "Inference-Header-Content-Length: found '1000000'"),
        (elements(["a"]), -1, "Inference-Header-Content-Length: found '-1'"),
        (elements(["a"]), "٣", "Inference-Header-Content-Length"),
        (elements(["a"]), 0, "the body is not JSON"),
    ],
)
def test_binary_data_that_breaks_off_is_refused(classifier: InProcess, data: bytes, length: Any, says: str) -> None:
    inputs = [{"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}]
    start = json.dumps({"inputs": inputs}).encode()
    header = str(len(start) if length is None else length).encode()
    response = classifier.request(
        "POST", INFER, content=start + data, headers=[(b"inference-header-content-length", header)]
    )
    assert response.status_code == 400, response.text
    assert says in response.json()["error"]


def test_bytes_that_belong_to_no_tensor_are_refused(classifier: InProcess) -> None:
    response = binary(classifier, {"inputs": [tensor(["a"])]}, b"abc")
    assert (response.status_code, "3 bytes of binary data" in response.json()["error"]) == (400, True)
