"""Files are answered as requests are, in order, and a bad row fails alone."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from banjoray.config.data import DataConfig
from banjoray.config.job import JobConfig
from banjoray.errors import ConfigError, DataError, RegistryError, RequestError
from banjoray.registry import ModelVersion
from banjoray.serving.batch import Predicted, _cell, answered, predict
from banjoray.serving.engine import Engine
from banjoray.tasks.task import task_for
from engines import ask, engine_of, registered
from factories import sample_rows

pytestmark = pytest.mark.usefixtures("local_ray")

Trained = tuple[JobConfig, ModelVersion, Engine]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, lively_job: Callable[..., JobConfig]) -> Trained:
    job = lively_job(tmp_path_factory.mktemp("predict"), train__epochs=2)
    version = registered(job)
    return job, version, engine_of(job, version)


def told(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def predicted(trained: Trained, file: Path, output: Path, **parameters: Any) -> Predicted:
    job, version, _ = trained
    return predict(str(version), str(file), str(output), job.registry.root, parameters)


def test_every_row_of_a_long_file_gets_the_endpoints_answer_in_order(tmp_path: Path, trained: Trained) -> None:
    texts = [f"{row['text']} {number % 7}" for number, row in enumerate(sample_rows("train") * 3)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)))
    found = predicted(trained, file, tmp_path / "out.jsonl", top_k=2)
    assert (found.rows, found.failed, found.version) == (len(texts), 0, str(trained[1]))
    lines = told(tmp_path / "out.jsonl")
    assert [line["row"] for line in lines] == list(range(1, len(texts) + 1))
    picked = range(0, len(texts), 97)
    alone = [ask(trained[2], {"inputs": [texts[number]], "parameters": {"top_k": 2}}) for number in picked]
    for number, expected in zip(picked, alone, strict=True):
        (answer,) = lines[number]["answer"]
        assert [entry["label"] for entry in answer] == [entry["label"] for entry in expected[0]]
        assert [entry["score"] for entry in answer] == pytest.approx(
            [entry["score"] for entry in expected[0]], abs=1e-5
        )


def test_a_bad_row_is_written_with_its_error_and_the_rest_go_on(tmp_path: Path, trained: Trained) -> None:
    file = tmp_path / "rows.jsonl"
    good = json.dumps({"text": "i am so happy"}).encode()
    bad = [b"{broken", b'{"text": "\xff\xfe"}', b'{"text": 7}', b'{"words": "x"}', b'{"text": "  "}', b"", b'["x"]']
    bad += [b'{"text": "' + b"a " * 2**19 + b'"}', b'{"text": "half \\ud83d"}']
    file.write_bytes(b"\n".join([good, *bad, good]) + b"\n")
    found = predicted(trained, file, tmp_path / "out.jsonl")
    lines = told(tmp_path / "out.jsonl")
    assert (found.rows, found.failed) == (11, 9)
    assert lines[0]["answer"] == lines[10]["answer"]
    errors = [line["error"] for line in lines[1:10]]
    assert [error.split(";")[0].split(" (")[0] for error in errors[:3]] == [
        "not JSON",
        "not UTF-8",
        "inputs: found int",
    ]
    assert errors[3].startswith("none of the columns 'text'")
    assert "nothing but blanks" in errors[4]
    assert errors[5].startswith("not JSON")
    assert errors[6] == "found list; needed an object with columns"
    assert errors[7] == "inputs.text: found 1,048,576 characters; needed fewer than 1,000,000"
    # As training says it of the same line.
    assert errors[1] == "not UTF-8 (byte 11 of the line)"
    assert errors[8] == "not UTF-8 (half a character: a lone surrogate)"
    assert found.first_errors[0] == f"row 2: {errors[0]}"


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_a_line_that_is_not_utf8_and_a_text_of_1_mb_fail_alone(tmp_path: Path, trained: Trained, kind: str) -> None:
    file = tmp_path / f"rows.{kind}"
    texts = [b"i am so happy", b"caf\xe9 here", b"a " * 2**19, b"007", b"NA", "naïve café".encode()]
    head, cells = ([b"text"], [b'"two\nlines"']) if kind == "csv" else ([], [])
    file.write_bytes(b"\n".join([*head, *texts, *cells]) + b"\n")
    found = predicted(trained, file, tmp_path / "out.jsonl")
    lines = told(tmp_path / "out.jsonl")
    assert (found.rows, found.failed) == (6 + len(cells), 2)
    part = "cell" if kind == "csv" else "line"
    assert lines[1] == {"row": 2, "error": f"not UTF-8 (byte 4 of the {part})"}
    assert lines[2] == {"row": 3, "error": "inputs.text: found 1,048,576 characters; needed fewer than 1,000,000"}
    good = ["i am so happy", "007", "NA", "naïve café", *["two\nlines"] * len(cells)]
    labels = [line["answer"][0][0]["label"] for line in lines if "answer" in line]
    assert labels == [answer[0]["label"] for answer in ask(trained[2], {"inputs": good})]


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_every_kind_of_file_is_read(tmp_path: Path, trained: Trained, kind: str) -> None:
    import datasets

    texts = ["i am so happy", 'naïve, "quoted" café 😀', "leave me alone"]
    file = tmp_path / f"rows.{kind}"
    rows = datasets.Dataset.from_dict({"text": texts})
    match kind:
        case "txt":
            file.write_text("\n".join(texts) + "\n", encoding="utf-8")
        case "csv":
            rows.to_csv(str(file), index=False)
        case "parquet":
            rows.to_parquet(str(file))
    assert predicted(trained, file, tmp_path / "out.jsonl").failed == 0
    labels = [line["answer"][0][0]["label"] for line in told(tmp_path / "out.jsonl")]
    assert labels == [answer[0]["label"] for answer in ask(trained[2], {"inputs": texts})]


def test_what_is_wrong_with_the_question_is_said_and_nothing_is_written(tmp_path: Path, trained: Trained) -> None:
    job, version, _ = trained
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n')
    out = str(tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="no file"):
        predict(str(version), str(tmp_path / "gone.jsonl"), out, job.registry.root)
    with pytest.raises(DataError, match=r"of no known kind; needed one of \.jsonl"):
        predict(str(version), str(tmp_path / "rows.xlsx"), out, job.registry.root)
    with pytest.raises(DataError, match="behind no known protocol"):
        predict(str(version), "nowhere://rows.jsonl", out, job.registry.root)
    with pytest.raises(ConfigError, match="there is no folder"):
        predict(str(version), str(file), str(tmp_path / "no" / "out.jsonl"), job.registry.root)
    with pytest.raises(RegistryError):
        predict("tiny@99", str(file), out, job.registry.root)
    assert list(tmp_path.iterdir()) == [file]


def test_a_parameter_that_the_task_does_not_have_is_every_rows_error(trained: Trained) -> None:
    lines = answered(trained[2], ["a", "b"], {"topk": 1})
    assert [line["error"].split(";")[0] for line in lines] == ["parameters: unknown ['topk']"] * 2


COLUMNS: dict[str, dict[str, str]] = {
    "text-classification": {"text": "a", "text_pair": "b"},
    "zero-shot-classification": {"text": "a"},
    "feature-extraction": {"text": "a"},
    "fill-mask": {"text": "a"},
    "token-classification": {"tokens": "words", "text": "a"},
    "question-answering": {"question": "q", "context": "c"},
    "translation": {"text": "a"},
    "text-generation": {"text": "a"},
}


@pytest.mark.parametrize("task", COLUMNS)
def test_a_row_is_asked_for_what_the_task_reads_and_not_for_what_it_learns(task: str) -> None:
    columns = {"text": "a", "text_pair": "b", "tokens": "words", "question": "q", "context": "c", "target": "t"}
    data = DataConfig.model_validate({"source": "x", "columns": columns})
    assert task_for(task).asked(data) == COLUMNS[task]


def test_words_are_asked_for_as_the_text_that_training_made_of_them() -> None:
    task = task_for("token-classification")
    spans = DataConfig.model_validate({"source": "x", "columns": {"spans": "entities"}})
    assert task.asked(spans) == {"text": "text"}
    assert task.inputs({"text": "Ada meets Bo"}) == "Ada meets Bo"
    assert task.inputs({"tokens": ["Ada", "meets", "Bo"], "text": "other"}) == "Ada meets Bo"
    for wrong in ("Ada", ["Ada", 3], None):
        with pytest.raises(RequestError, match=re.escape(f"tokens: found {wrong!r}; needed a list of words")):
            task.inputs({"tokens": wrong})


def test_a_column_is_found_inside_another_and_in_a_table() -> None:
    row = {"translation": {"en": "one", "de": {"old": "eyn"}}, "plain.en": "two", "plain": {"en": "three"}}
    assert [_cell(row, name) for name in ("translation.en", "translation.de.old", "plain.en")] == ["one", "eyn", "two"]
    assert _cell({"tokens": np.array(["a", "b"], dtype=object)}, "tokens") == ["a", "b"]
    for name in ("translation.fr", "plain.de", "text", "translation.en.old"):
        with pytest.raises(KeyError):
            _cell(row, name)
