"""Jobs on files with rows that can't be used, and what becomes of these."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.data.splits import Splits
from banjoray.errors import DataError
from banjoray.tasks.task import task_for

Row = Mapping[str, Any]
CONTEXT = "The river Aar rises in the Alps and joins the Rhine."
LONG = "word " * 210_000
NO_NAME = "not JSON (Expecting property name enclosed in double quotes at character"
LONG_TOLD = "holds 1,050,000 characters; needed fewer than 1,000,000: cut it, or make rows of its parts"
SPANNED: Row = {"text": "Ada is in Ulm", "spans": [{"start": 0, "end": 3, "label": "PER"}]}
SHAPES: dict[str, tuple[dict[str, Any], list[Row]]] = {
    "text-classification": ({}, [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]),
    "zero-shot-classification": (
        {"columns": {"text_pair": "second"}},
        [{"text": "x", "second": "y", "label": "entailment"}, {"text": "x", "second": "z", "label": "neutral"}],
    ),
    "feature-extraction": (
        {"columns": {"text_pair": "second"}},
        [{"text": "x", "second": "y"}, {"text": "v", "second": "w"}],
    ),
    "token-classification": (
        {},
        [{"tokens": ["Ada", "runs"], "tags": ["B-PER", "O"]}, {"tokens": ["in", "Ulm"], "tags": ["O", "B-LOC"]}],
    ),
    "token-classification of spans": ({"columns": {"spans": "spans"}}, [SPANNED, {"text": "nobody", "spans": []}]),
    "question-answering": (
        {},
        [
            {"question": "Where?", "context": CONTEXT, "answers": {"text": ["the Alps"], "answer_start": [23]}},
            {"question": "Why?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
        ],
    ),
    "fill-mask": ({}, [{"text": "one two"}, {"text": "three"}]),
    "text-generation": ({"columns": {"target": "out"}}, [{"text": "one", "out": "two"}, {"text": "a", "out": "b"}]),
    "summarization": ({"columns": {"target": "out"}}, [{"text": "one", "out": "two"}, {"text": "a", "out": "b"}]),
    "translation": ({"columns": {"target": "out"}}, [{"text": "one", "out": "two"}, {"text": "a", "out": "b"}]),
}


def job(task: str, files: Mapping[str, Path], skip: bool = True, **data: Any) -> JobConfig:
    shape = SHAPES[task][0]
    named = {split: str(path) for split, path in files.items()}
    tree = {"name": "t", "task": task.split(" of ")[0], "hub": {"offline": True}}
    return validate(JobConfig, tree | {"data": {"files": named, "skip_bad_rows": skip, **shape, **data}}, "job")


def splits_of(made: JobConfig) -> Splits:
    return task_for(made.task).settled(made).splits(made)


def refused(made: JobConfig) -> str:
    with pytest.raises(DataError) as caught:
        splits_of(made)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def line(row: Any) -> bytes:
    return (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n"


def listed(splits: Splits, split: str = "train") -> list[dict[str, Any]]:
    return [row.to_json() for source in splits.left_out if source.split == split for row in source.bad]


def read_text(folder: Path, task: str, name: str, content: bytes, **data: Any) -> tuple[str, Splits]:
    """What is told of a train file, and its splits without bad rows."""
    (folder / name).write_bytes(content)
    files = {"train": folder / name, "validation": folder / name}
    return refused(job(task, files, skip=False, **data)), splits_of(job(task, files, **data))


def cells(splits: Splits, column: str) -> list[Any]:
    return [cell for batch in splits.train.batches(100) for cell in batch[column]]
