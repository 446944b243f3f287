"""A profile counts what is in the rows: labels, lengths, and rows that repeat, contradict or leak."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from banjoray.data.profile import Found, Profile
from banjoray.reports.profile import bins, findings, profile_lines, profile_page
from banjoray.training.preflight import profiled
from factories import make_job, sample_rows, tiny_tokenizer, write_rows

pytestmark = pytest.mark.usefixtures("own_cache")

TRAIN = [
    {"text": "so happy today", "label": "joy"},
    {"text": "So  happy today ", "label": "joy"},
    {"text": "i am angry", "label": "anger"},
    {"text": "i am angry", "label": "joy"},
    {"text": "a much longer text about being happy and angry at once", "label": "anger"},
]
HELD = [{"text": "i am angry", "label": "anger"}, {"text": "nobody knows", "label": "joy"}]


def profile_of(folder: Path, train: Sequence[Mapping[str, Any]] = TRAIN, **changes: Any) -> Profile:
    job = make_job(folder, **changes)
    files = {"train": str(write_rows(folder / "a.jsonl", train)), "test": str(write_rows(folder / "b.jsonl", HELD))}
    validation = str(write_rows(folder / "c.jsonl", [{"text": "other words", "label": "joy"}]))
    return profiled(job.with_values({"data.files": files | {"validation": validation}}))


def test_labels_are_counted_in_every_split(tmp_path: Path) -> None:
    train, validation, test = profile_of(tmp_path).splits
    assert (train.rows, dict(train.labels)) == (5, {"anger": 2, "joy": 3})
    assert (validation.rows, dict(validation.labels)) == (1, {"anger": 0, "joy": 1})
    assert (test.rows, dict(test.labels)) == (2, {"anger": 1, "joy": 1})


def test_lengths_are_those_of_the_tokenizer_before_anything_is_cut(tmp_path: Path) -> None:
    found = profile_of(tmp_path, data__max_length=6).splits[0].lengths
    own = [len(tiny_tokenizer()(row["text"])["input_ids"]) for row in TRAIN]
    assert (found.shortest, found.longest, found.over) == (min(own), max(own), sum(length > 6 for length in own))
    assert found.median == np.median(own)
    for low, high, count in bins(found):
        assert count == sum(low <= length <= high for length in own)
    assert sum(found.counts) == len(TRAIN)


def test_rows_that_repeat_contradict_and_leak_are_named(tmp_path: Path) -> None:
    found = profile_of(tmp_path)
    train = found.splits[0]
    # Blanks and capitals make no other text; row 4 repeats the text of row 3, under another label.
    assert train.repeated == Found(1, (2,))
    assert train.contradicting == Found(2, (3, 4))
    assert {(both.first, both.second): both.found for both in found.overlaps} == {
        ("train", "validation"): Found(0, ()),
        ("train", "test"): Found(1, (1,)),
        ("validation", "test"): Found(0, ()),
    }
    told = "\n".join(findings(found))
    assert "train: 1 rows repeat an earlier one (row 2)" in told
    assert "train: 2 rows have a text that stands under another label too (rows 3, 4)" in told
    assert "test: 1 rows stand in train too (row 1)" in told


def test_nothing_to_look_at_is_said(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert findings(profiled(job)) == [
        "nothing to look at: no row repeats, contradicts another, is cut, or stands in two splits"
    ]
    assert sum(profiled(job).splits[0].labels.values()) == len(sample_rows("train")[:96])


def test_only_the_first_rows_of_a_finding_are_named(tmp_path: Path) -> None:
    rows = [{"text": "again", "label": label} for label in ["joy"] * 9 + ["anger"]]
    found = profile_of(tmp_path, rows)
    assert found.splits[0].repeated == Found(8, (2, 3, 4, 5, 6))
    assert "(rows 2, 3, 4, 5, 6, ...)" in "\n".join(findings(found))


def test_the_terminal_the_page_and_the_json_tell_the_same(tmp_path: Path) -> None:
    found = profile_of(tmp_path, data__max_length=6)
    console = Console(width=120)
    with console.capture() as capture:
        for line in profile_lines(found):
            console.print(line)
    shown, page = capture.get(), profile_page("tiny <b>", found)
    for line in findings(found):
        assert line[:60] in shown.replace("\n", " ")
        assert line in page.replace("&#39;", "'")
    assert "tiny &lt;b&gt;" in page
    assert "http" not in page
    assert json.loads(json.dumps(found.to_json()))["splits"][0]["labels"] == {"anger": 2, "joy": 3}
