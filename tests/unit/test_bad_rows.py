"""Rows that can't be used: each is refused by file, row and reason, or left out, counted and listed; the rest is as if
they had never been there."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from banjoray.config.job import JobConfig
from banjoray.data.bad_rows import SHOWN, TOO_LONG, BadRow, LeftOut, lines_about, write_list
from banjoray.errors import RequestError
from banjoray.tasks.task import text_of
from banjoray.training.checkpoints import Store
from banjoray.training.interface import Callbacks
from banjoray.training.learned import WEIGHTS
from banjoray.training.loop import fit
from banjoray.training.preflight import prepare, profiled
from broken import LONG, LONG_TOLD, NO_NAME, SHAPES, job, line, listed, refused, splits_of
from factories import make_job, sample_rows, write_rows

pytestmark = pytest.mark.usefixtures("own_cache")


@dataclass(frozen=True)
class Case:
    """A bad row of a task: changes of its first good row, or a whole line; what is told of it, with its column."""

    task: str
    bad: Any
    column: str | None
    reason: str
    data: dict[str, Any] = field(default_factory=dict)


def span(start: Any, end: Any, label: Any = "PER") -> dict[str, Any]:
    return {"spans": [{"start": start, "end": end, "label": label}]}


def answer(text: Any, start: Any) -> dict[str, Any]:
    return {"answers": {"text": [text], "answer_start": [start]}}


TEXTS = {
    "text-classification": ["text"],
    "zero-shot-classification": ["text", "second"],
    "feature-extraction": ["text", "second"],
    "token-classification of spans": ["text"],
    "question-answering": ["question", "context"],
    "fill-mask": ["text"],
    "text-generation": ["text", "out"],
    "summarization": ["text", "out"],
    "translation": ["text", "out"],
}
OF_TEXTS = [
    Case(task, {column: cell}, column, reason)
    for task, columns in TEXTS.items()
    for column in columns
    for cell, reason in (
        (None, "holds nothing; needed text"),
        ("\t ", "holds only blanks; needed text"),
        (7, "holds 7; needed text"),
        (["x"], "holds ['x']; needed text"),
        (LONG, LONG_TOLD),
    )
]
OF_LINES = [
    Case(task, bad, None, reason)
    for task in SHAPES
    for bad, reason in (
        (b'{"text": "\xff"}', "line {row} is not UTF-8 (byte 11 of the line)"),
        (
            b'{"text": "x", ',
            f"row {{row}} is {NO_NAME} 14)",
        ),
        (b"[1, 2]", "row {row} holds list, needed an object with columns"),
        (b'{"text": "\\ud83d"}', "row {row} is not UTF-8 (half a character: a lone surrogate)"),
    )
]
OF_TASKS = [
    Case("text-classification", {"label": None}, "label", "holds no label (None); needed one of a, b"),
    Case("text-classification", {"label": ""}, "label", "holds no label (''); needed one of a, b"),
    Case(
        "text-classification",
        {"label": 3},
        "label",
        "holds 3; needed a label's name, or a whole number, the same kind in every row",
    ),
    Case(
        "text-classification",
        {"label": "c"},
        "label",
        "holds label 'c', which data.labels does not list; it lists a, b",
        {"labels": ["a", "b"]},
    ),
    Case("token-classification", {"tags": ["O"]}, "tags", "holds 1 tags for 2 words; needed a tag for every word"),
    Case("token-classification", {"tokens": []}, "tokens", "holds no words; needed a list of words"),
    Case("token-classification", {"tokens": "Ada"}, "tokens", "holds 'Ada'; needed a list of words"),
    Case("token-classification", {"tokens": ["Ada", None]}, "tokens", "word 2 is None; needed text"),
    Case("token-classification", {"tokens": ["Ada", 7]}, "tokens", "word 2 is 7; needed text"),
    Case("token-classification", {"tokens": ["Ada", "x" * 1_049_996]}, "tokens", LONG_TOLD),
    Case("token-classification", {"tags": None}, "tags", "holds None; needed a list with a tag for every word"),
    Case(
        "token-classification", {"tags": ["O", None]}, "tags", "tag 2 is None; needed a name, or a number that has one"
    ),
    Case(
        "token-classification",
        {"tags": ["O", "B-ORG"]},
        "tags",
        "holds the tag 'B-ORG', which data.labels does not list; known are O, B-PER, B-LOC",
        {"labels": ["O", "B-PER", "B-LOC"]},
    ),
    Case(
        "token-classification of spans",
        span(5, 99),
        "spans",
        "span 1 is [5, 99); needed 0 <= start < end <= 13, the text's length",
    ),
    Case(
        "token-classification of spans",
        span(-1, 3),
        "spans",
        "span 1 is [-1, 3); needed 0 <= start < end <= 13, the text's length",
    ),
    Case("token-classification of spans", span(0.5, 3), "spans", "span 1: start is 0.5; needed a number of characters"),
    Case(
        "token-classification of spans",
        span(3, 4),
        "spans",
        "span 1 is [3, 4), which covers blanks only; needed a word",
    ),
    Case(
        "token-classification of spans",
        {"spans": [*span(0, 6)["spans"], *span(4, 9, "LOC")["spans"]]},
        "spans",
        "[0, 6) 'PER' and [4, 9) 'LOC' overlap; needed spans apart, since a word has one tag",
    ),
    Case(
        "token-classification of spans",
        span(0, 3, "ORG"),
        "spans",
        "holds the tag 'B-ORG', which data.labels does not list; known are O, B-PER, I-PER",
        {"labels": ["O", "B-PER", "I-PER"]},
    ),
    Case(
        "question-answering",
        answer("Bern", 0),
        "answers",
        "says that 'Bern' is at character 0 of its context, which it does not have; there is 'The '",
    ),
    Case(
        "question-answering",
        answer("the Alps", 24),
        "answers",
        "says that 'the Alps' is at character 24 of its context, which stands at 23; there is 'he Alps '",
    ),
    Case(
        "question-answering",
        answer("Aar", 9999),
        "answers",
        "says that 'Aar' is at character 9999 of its context, which stands at 10; there is ''",
    ),
    Case(
        "question-answering",
        {"answers": {"text": ["Aar", "Alps"], "answer_start": [10]}},
        "answers",
        "holds 2 in text and 1 in answer_start; needed one start for each text",
    ),
    Case("question-answering", answer(" ", 3), "answers", "holds ' ' in text; needed text"),
]
CASES = [*OF_TEXTS, *OF_LINES, *OF_TASKS]


def written(folder: Path, case: Case) -> dict[str, Path]:
    """A train file with the case's bad row as its rows 2 and 6, and a validation file without."""
    good = SHAPES[case.task][1]
    bad = case.bad if isinstance(case.bad, bytes) else {**good[0], **case.bad}
    rows = [good[0], bad, good[1], good[0], good[1], bad, good[0]]
    (folder / "train.jsonl").write_bytes(b"".join(map(line, rows)))
    (folder / "clean.jsonl").write_bytes(b"".join(line(row) for row in rows if row is not bad))
    return {"train": folder / "train.jsonl", "validation": folder / "clean.jsonl"}


def name_of(case: Case) -> str:
    return f"{case.task}-{case.reason[:40]}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_bad_row_is_refused_with_its_file_row_and_reason_and_how_many_there_are(tmp_path: Path, case: Case) -> None:
    place = f", column '{case.column}'" if case.column else " can't be read"
    where = f"train.jsonl row 2{place}" if case.column else f"train.jsonl{place}"
    told = refused(job(case.task, written(tmp_path, case), skip=False, **case.data))
    assert told.startswith(f"data: {where}")
    assert told.removeprefix(f"data: {where}").lstrip(" ,:") == (
        case.reason.format(row=2) + " (2 such rows in all; --skip-bad-rows leaves them out)"
    )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_bad_rows_are_left_out_and_listed_and_the_rest_is_as_without_them(tmp_path: Path, case: Case) -> None:
    files = written(tmp_path, case)
    splits = splits_of(job(case.task, files, **case.data))
    clean = splits_of(job(case.task, files | {"train": files["validation"]}, **case.data))
    assert splits.labels == clean.labels
    assert splits.fingerprint() == clean.fingerprint()
    assert len(splits.train) == 5
    assert splits.train.numbers is not None
    assert splits.train.numbers.tolist() == [0, 2, 3, 4, 6]
    assert clean.left_out == ()
    assert [(source.split, source.file, source.rows) for source in splits.left_out] == [("train", "train.jsonl", 7)]
    assert listed(splits) == [
        {"file": "train.jsonl", "row": row, "column": case.column, "reason": case.reason.format(row=row)}
        for row in (2, 6)
    ]


def bad_row(number: int, kind: str = "no text") -> BadRow:
    return BadRow("a.jsonl", number, f"a.jsonl row {number}", kind, " holds é", "text")


def test_people_read_how_many_rows_are_left_out_why_and_which_the_first_are() -> None:
    bad = [bad_row(number) for number in range(1, 12)] + [bad_row(20, "unknown label")]
    told = lines_about([LeftOut("train", "a.jsonl", 40, tuple(bad)), LeftOut("test", "b.jsonl", 2, (bad_row(1),))])
    assert told[0] == "train: 12 of 40 rows of a.jsonl left out (no text: 11, unknown label: 1)"
    assert told[1:3] == ["  a.jsonl row 1, column 'text' holds é", "  a.jsonl row 2, column 'text' holds é"]
    assert told[SHOWN + 1 : SHOWN + 3] == ["  and 2 more", "test: 1 of 2 rows of b.jsonl left out (no text: 1)"]
    assert lines_about([]) == []


def test_the_list_has_a_line_for_every_bad_row_wherever_the_folder_is(tmp_path: Path) -> None:
    left_out = [LeftOut("train", "a.jsonl", 40, (bad_row(1), bad_row(2)))]
    for folder in (str(tmp_path), f"memory://{tmp_path.name}"):
        place = write_list(left_out, folder)
        assert place == f"{folder}/bad_rows.jsonl"
        with fsspec.open(place, "rt", encoding="utf-8") as file:
            assert [json.loads(line) for line in file] == [row.to_json() for row in left_out[0].bad]
    assert write_list([], str(tmp_path / "nothing")) is None


def broken(folder: Path, split: str, count: int) -> Path:
    """The first rows of a sample split as lines, with bad ones between them."""
    rows: list[Any] = list(sample_rows(split)[:count])
    rows.insert(7, b'{"text": "\xff", "label": "joy"}')
    rows.insert(3, {"text": LONG, "label": "joy"})
    rows.insert(1, {"text": " ", "label": "joy"})
    rows.append({"text": "who?", "label": None})
    path = folder / f"{split}.jsonl"
    path.write_bytes(b"".join(map(line, rows)))
    return path


def weights(made: JobConfig, run: Path) -> dict[str, torch.Tensor]:
    ready = prepare(made)
    result = fit(made, ready.rows, ready.task, ready.start, str(run), Callbacks())
    return load_file(Store(str(run), print).local(result.checkpoint) / WEIGHTS)


@pytest.mark.parametrize("cut", [False, True], ids=["validation given", "validation cut off train"])
def test_a_run_that_skips_bad_rows_is_bit_for_bit_the_run_that_never_had_them(tmp_path: Path, cut: bool) -> None:
    clean = make_job(tmp_path, train__epochs=1).with_values({"data.files.validation": None} if cut else {})
    (tmp_path / "dirty").mkdir()
    files = {
        split: str(broken(tmp_path / "dirty", split, count)) for split, count in (("train", 96), ("validation", 30))
    }
    if cut:
        files["validation"] = None  # type: ignore[assignment]
    dirty = clean.with_values({"data.files": files, "data.skip_bad_rows": True})
    assert dirty.training_digest() != clean.training_digest()
    expected, found = weights(clean, tmp_path / "clean"), weights(dirty, tmp_path / "run")
    assert expected.keys() == found.keys()
    assert [name for name, weight in expected.items() if not torch.equal(weight, found[name])] == []
    ready = prepare(dirty)
    assert ready.fingerprint == prepare(clean.with_values({"data.files.test": None})).fingerprint
    counted = "(not UTF-8: 1, no text: 1, too long: 1, no label: 1)"
    assert ready.warnings[0] == f"train: 4 of 100 rows of train.jsonl left out {counted}"
    assert ready.warnings[1] == "  train.jsonl: line 10 is not UTF-8 (byte 11 of the line)"
    assert len(ready.warnings) == (5 if cut else 10)


def test_a_profile_names_rows_as_the_file_has_them_and_lists_those_left_out(tmp_path: Path) -> None:
    rows = [{"text": "", "label": "joy"}, {"text": "twice", "label": "joy"}, {"text": "else", "label": "anger"}]
    path = write_rows(tmp_path / "bad.jsonl", [*rows, {"text": "Twice", "label": "joy"}])
    made = make_job(tmp_path).with_values({"data.files.train": str(path), "data.files.test": None})
    held = write_rows(tmp_path / "held.jsonl", rows[2:])
    found = profiled(made.with_values({"data.files.validation": str(held), "data.skip_bad_rows": True}))
    assert (found.splits[0].rows, found.splits[0].repeated.first) == (3, (4,))
    assert found.to_json()["left_out"] == [
        {
            "split": "train",
            "file": "bad.jsonl",
            "rows": 4,
            "bad": [{"file": "bad.jsonl", "row": 1, "column": "text", "reason": "holds only blanks; needed text"}],
        }
    ]


def test_a_request_may_be_as_long_as_a_row() -> None:
    assert text_of("x" * (TOO_LONG - 1), "inputs")
    with pytest.raises(RequestError, match=r"inputs: found 1,000,000 characters; needed fewer than 1,000,000"):
        text_of("x" * TOO_LONG, "inputs")
