"""Requests that mean no good, and what an endpoint in this process makes of them.

As a script: ``python tests/hostile.py --cases 2000`` sends what schemathesis makes of the OpenAPI document to an
endpoint around a model of random weights, and prints how many answers there were of each status.
"""

import argparse
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from banjoray.errors import RequestError
from endpoints import endpoint, untrained

TINY = Path(__file__).parents[1] / "jobs/tiny"
# One file for each task.
FILES = {
    "text-classification": "train_emotion.yaml",
    "zero-shot-classification": "train_zero_shot.yaml",
    "token-classification": "train_ner.yaml",
    "question-answering": "train_squad.yaml",
    "fill-mask": "train_mlm.yaml",
    "feature-extraction": "train_embeddings.yaml",
    "summarization": "train_summarization.yaml",
    "translation": "train_translation.yaml",
    "text-generation": "train_text_generation.yaml",
}
# Short answers: random weights write until they may not.
SHORT = {"summarization": {"max_new_tokens": 2}, "translation": {"max_new_tokens": 2}}
SHORT["text-generation"] = SHORT["summarization"]

# As JSON text: some of them no library would write.
VALUES = (
    "null",
    "true",
    "0",
    "-1",
    "1e999",
    "-1e999",
    "1e308",
    "0.1",
    "1" + "0" * 300,
    "-1" + "0" * 300,
    '""',
    '" "',
    '"a"',
    '"' + "a" * 50_000 + '"',
    '"\\ud800"',
    '"\\u0000"',
    "[]",
    "{}",
    "[null]",
    "[[]]",
    '[""]',
    '["\\udfff"]',
    '["a", "a"]',
    '{"a": {"b": []}}',
    "[" * 400 + "]" * 400,
)
# Whole bodies, with no task in mind.
BODIES: tuple[bytes, ...] = (
    b"",
    b"\x00",
    b"\xff\xfe\xfd",
    b"[" * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 100_000,
    b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"inputs": "' + b"a" * 3_000_000 + b'"}',
    b'{"inputs": NaN}',
    b'{"inputs": [1e999]}',
    b'{"inputs": ' + b"9" * 5000 + b"}",
    b'{"inputs": "\xed\xa0\x80"}',
    b'{"inputs": "a", "inputs": 3}',
    b'{"inputs": "a", "\\ud800": 1}',
    b'{"inputs": "a", "parameters": {"\\ud800": 1}}',
    b'{"inputs": "a", "parameters": {"' + b"k" * 100_000 + b'": 1}}',
    json.dumps({"inputs": ["a"] * 10_000}).encode(),
    json.dumps({"inputs": [{"text": "a", "text_pair": "b"}] * 10_000}).encode(),
    json.dumps({"inputs": {"source_sentence": "a", "sentences": ["b"] * 10_000}}).encode(),
    json.dumps({"inputs": ["a"] * 250, "parameters": {"candidate_labels": [str(n) for n in range(200_000)]}}).encode(),
    json.dumps({"inputs": "a", "parameters": {"candidate_labels": ["a"] * 300_000}}).encode(),
    json.dumps({"inputs": "a", "parameters": {"candidate_labels": "," * 1_000_000}}).encode(),
    json.dumps({"inputs": "a", "parameters": {f"key{number}": 1 for number in range(50_000)}}).encode(),
    b"--boundary\r\ncontent-disposition: form-data\r\n\r\n",
)


def usual(task: str) -> dict[str, Any]:
    """A request that the task answers."""
    inputs: Any = "a good day"
    parameters: dict[str, Any] = dict(SHORT.get(task, {}))
    if task == "question-answering":
        inputs = {"question": "who", "context": "she was there"}
    if task == "fill-mask":
        inputs = "a [MASK] day"
    if task == "zero-shot-classification":
        parameters = {"candidate_labels": ["a", "b"]}
    return {"inputs": inputs, "parameters": parameters}


def known(engine: Any, task: str) -> list[str]:
    """The parameters of a task, as it names them to somebody who sent another."""
    asked = usual(task)
    try:
        ask = engine.task.parse(asked["inputs"], asked["parameters"] | {"nobody": 1})
        rows = engine.encode(ask.rows)
        outputs = engine.forward([feature for row in rows for feature in row])
        engine.answer(ask, rows, outputs)
    except RequestError as error:
        return re.split(r",? (?:and )?", error.message.partition(" has ")[2].replace(", ", " "))
    raise AssertionError(f"{task} takes a parameter that it does not know")


def bodies(engine: Any, task: str) -> list[bytes]:
    """Every value in the place of every parameter and of the inputs, and `BODIES`."""
    asked = usual(task)
    found = list(BODIES)
    usual_parameters = json.dumps(asked["parameters"])
    for value in VALUES:
        shapes = (value, f"[{value}]", f'{{"text": {value}}}', f'{{"question": {value}, "context": {value}}}')
        found += [f'{{"inputs": {inputs}, "parameters": {usual_parameters}}}'.encode() for inputs in shapes]
        found.append(f'{{"inputs": "a", "parameters": {value}}}'.encode())
        for name in known(engine, task):
            rest = {key: kept for key, kept in asked["parameters"].items() if key != name}
            parameters = json.dumps(rest)[:-1] + (", " if rest else "") + f'"{name}": {value}}}'
            found.append(f'{{"inputs": {json.dumps(asked["inputs"])}, "parameters": {parameters}}}'.encode())
    return found


def explore(cases: int) -> Counter[int]:
    """Statuses of the answers to at least so many cases of schemathesis' making; AssertionError for a 500."""
    import hypothesis
    import schemathesis

    from banjoray.serving.app import api

    schema = schemathesis.openapi.from_asgi("/openapi.json", api)
    found: list[Any] = list(schema.get_all_operations())
    operations = [one.ok() for one in found]
    statuses: Counter[int] = Counter()

    def sent(case: Any) -> None:
        if statuses.total() % 4 and case.path_parameters:
            # Of the names and numbers that are made up, hardly one is a model's.
            served = {"name": "tiny", "version": "1"}
            case.path_parameters = {name: served[name] for name in case.path_parameters}
        response = case.call()
        statuses[response.status_code] += 1
        assert response.status_code < 500, (case.method, case.path, case.body, response.text)

    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    posts = [operation for operation in operations if operation.method.upper() == "POST"]
    # A route without a body can be asked in one way, and in no wrong one.
    plans = [(operation, modes[0], 2) for operation in operations if operation not in posts]
    plans += [(operation, mode, -(-cases // (len(posts) * len(modes)))) for operation in posts for mode in modes]
    for operation, mode, wanted in plans:
        settings = hypothesis.settings(
            max_examples=wanted,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        drawn: Any = hypothesis.given(operation.as_strategy(generation_mode=mode))
        run: Any = settings(drawn(sent))
        run()
    return statuses


def main() -> None:
    """Send the cases and say what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--task", choices=FILES, default="text-classification")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        endpoint(patch, untrained(TINY / FILES[asked.task], Path(folder)), access_log=False)
        statuses = explore(asked.cases)
    print(f"{sum(statuses.values())} cases, no 500:", dict(sorted(statuses.items())))  # noqa: T201


if __name__ == "__main__":
    main()
