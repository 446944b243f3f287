"""Bodies of Hugging Face's inference API: what is read, what is refused with which status, what goes back."""

import json
from typing import Any

import numpy as np
import pytest

from banjoray.errors import RequestError
from banjoray.serving.protocols.huggingface import parse
from banjoray.tasks.task import Ask, Seen
from banjoray.tasks.text_classification import TextClassification

TASK = TextClassification()
LABELS = ("anger", "fear", "joy")
MAX_ROWS = 4


def ask(request: Any) -> Ask:
    return parse(json.dumps(request).encode(), TASK, MAX_ROWS)


def answer(outputs: list[np.ndarray], asked: Ask) -> Any:
    return TASK.answer(asked, [Seen([], [row]) for row in outputs], LABELS, None)


def refusal(body: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(body, TASK, MAX_ROWS)
    return caught.value


@pytest.mark.parametrize(
    ("inputs", "rows"),
    [
        ("hello", [{"text": "hello"}]),
        (["a", "b"], [{"text": "a"}, {"text": "b"}]),
        ({"text": "a", "text_pair": "b"}, [{"text": "a", "text_pair": "b"}]),
        ([{"text": "a"}, "b"], [{"text": "a"}, {"text": "b"}]),
        (["row"] * MAX_ROWS, [{"text": "row"}] * MAX_ROWS),
    ],
)
def test_the_rows_of_a_request_are_the_tasks(inputs: Any, rows: list[dict[str, str]]) -> None:
    assert ask({"inputs": inputs}) == Ask(rows, {}, single=not isinstance(inputs, list))


@pytest.mark.parametrize("parameters", [{}, {"top_k": 2}, {"function_to_apply": "none", "top_k": None}])
def test_parameters_are_passed_on(parameters: dict[str, Any]) -> None:
    assert ask({"inputs": "a", "parameters": parameters}).parameters == parameters


def test_no_parameters_and_null_parameters_are_the_same() -> None:
    assert ask({"inputs": "a", "parameters": None}) == ask({"inputs": "a"})


def test_other_keys_that_clients_send_are_let_through() -> None:
    assert ask({"inputs": "a", "options": {"wait_for_model": True}}) == ask({"inputs": "a"})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_comes_through_in_every_encoding_of_json(encoding: str) -> None:
    body = json.dumps({"inputs": "naïve 😀"}, ensure_ascii=False).encode(encoding)
    assert parse(body, TASK, MAX_ROWS).rows == [{"text": "naïve 😀"}]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"hello",
        b"{",
        b"{'inputs': 'a'}",
        b'{"inputs": "a"',
        b'{"inputs": "a",}',
        b'{"inputs": "a"} {"inputs": "b"}',
        b'{"inputs": "\xff\xfe"}',
        b"\x00\x01\x02\x03",
        b"inputs=a&parameters=b",
        b'{"inputs": NaN}',
        b'{"inputs": "a", "parameters": {"top_k": -Infinity}}',
        b'{"inputs": ' + b"9" * 10_000 + b"}",
        b"[" * 200_000,
        b'{"inputs":' * 200_000,
        b"[" * 200_000 + b"]" * 200_000,
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_body_that_is_not_json_gets_400(body: bytes) -> None:
    error = refusal(body)
    assert error.status == 400
    assert error.message.startswith("the body is not JSON (")
    assert len(error.message) < 300


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ("hello", "the body holds str"),
        (["hello"], "the body holds list"),
        (None, "the body holds NoneType"),
        (7, "the body holds int"),
        ({}, "the body holds keys []"),
        ({"input": "a", "text": "b"}, "the body holds keys ['input', 'text']"),
        ({"inputs": None}, "inputs: found NoneType"),
        ({"inputs": []}, "inputs: an empty list"),
        ({"inputs": ["a", 1]}, "inputs[1]: found int"),
        ({"inputs": {"text": ["a"]}}, "inputs.text: found list"),
        ({"inputs": "a", "parameters": []}, "parameters: found list; needed an object"),
        ({"inputs": "a", "parameters": "top_k"}, "parameters: found str; needed an object"),
        ({"inputs": "a", "parameters": 0}, "parameters: found int; needed an object"),
        ({"inputs": "a", "parameters": False}, "parameters: found bool; needed an object"),
    ],
)
def test_json_of_another_shape_gets_422_and_the_place(request_: Any, words: str) -> None:
    error = refusal(json.dumps(request_).encode())
    assert error.status == 422
    assert error.message.startswith(words)


def test_deep_json_inside_the_inputs_gets_422() -> None:
    error = refusal(b'{"inputs": ' + b"[" * 500 + b"]" * 500 + b"}")
    assert (error.status, error.message.split(";")[0]) == (422, "inputs[0]: found list")


@pytest.mark.parametrize("count", [MAX_ROWS + 1, 300_000])
def test_too_many_rows_get_413_before_any_of_them_is_looked_at(count: int) -> None:
    # The rows are wrong as well; a look at them would give 422.
    error = refusal(json.dumps({"inputs": [7] * count}).encode())
    assert error.status == 413
    assert error.message == f"inputs: found {count} rows; this endpoint takes {MAX_ROWS} in one request"


@pytest.mark.parametrize("rows", [1, 3])
def test_an_answer_is_a_list_per_row_even_for_one(rows: int) -> None:
    outputs = list(np.random.default_rng(rows).normal(size=(rows, 3)).astype(np.float32))
    asked = ask({"inputs": ["a"] * rows, "parameters": {"top_k": 2}})
    answers = answer(outputs, asked)
    assert answers == [answer([row], ask({"inputs": "a", "parameters": {"top_k": 2}}))[0] for row in outputs]
    assert [row[0]["label"] for row in answers] == [LABELS[row.argmax()] for row in outputs]
    assert [len(row) for row in answers] == [2] * rows


def test_an_answer_is_plain_json() -> None:
    answers = answer([np.zeros(3, dtype=np.float32)], ask({"inputs": "a"}))
    assert json.loads(json.dumps(answers, allow_nan=False)) == answers


def test_a_wrong_parameter_gets_422_by_name() -> None:
    with pytest.raises(RequestError, match=r"^parameters: unknown \['topk'\]") as caught:
        answer([np.zeros(3)], ask({"inputs": "a", "parameters": {"topk": 1}}))
    assert caught.value.status == 422
