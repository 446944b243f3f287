"""The rows that ship are what they claim to be: answers stand where they say, tags fit, no row is in two splits."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from banjoray.data.sources import SHIPPED, SPLITS

SETS = sorted(path for path in SHIPPED.iterdir() if path.is_dir())
SMALL = [path for path in SETS if path.name != "emotion"]


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def every(name: str) -> list[dict[str, Any]]:
    return [row for split in SPLITS for row in rows(SHIPPED / name, split)]


def test_the_readme_names_every_set() -> None:
    told = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert [line.split("`")[1] for line in told.splitlines() if line.startswith("| `")] == [path.name for path in SMALL]


@pytest.mark.parametrize("folder", SMALL, ids=lambda path: path.name)
def test_a_set_has_the_rows_that_the_readme_counts_and_none_twice(folder: Path) -> None:
    counts = {split: len(rows(folder, split)) for split in SPLITS}
    assert 24 <= counts["train"] <= 36
    assert {counts["validation"], counts["test"]} <= {8, 9}
    written = [json.dumps(row) for row in every(folder.name)]
    assert len(set(written)) == len(written)
    assert {tuple(row) for row in every(folder.name)} == {tuple(rows(folder, "train")[0])}


def test_every_answer_stands_in_its_context_where_it_says_and_only_there() -> None:
    for row in every("questions"):
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(text)] == text
        assert row["context"].count(text) == 1
        assert row["question"].endswith("?")


def test_no_context_is_in_two_splits() -> None:
    for name, column in (("questions", "context"), ("entailment", "premise"), ("dialogues", "dialogue")):
        seen = [{row[column] for row in rows(SHIPPED / name, split)} for split in SPLITS]
        assert len(set().union(*seen)) == sum(map(len, seen))


def test_every_word_has_a_tag_that_goes_on_only_what_has_begun() -> None:
    train = {tag for row in rows(SHIPPED / "entities", "train") for tag in row["tags"]}
    assert train == {"O", *(f"{part}-{kind}" for part in "BI" for kind in ("PER", "LOC", "ORG", "MISC"))}
    for row in every("entities"):
        assert len(row["tokens"]) == len(row["tags"])
        assert all(word == word.strip() != "" for word in row["tokens"])
        for before, tag in zip(["O", *row["tags"]], row["tags"], strict=False):
            assert tag in train
            assert not tag.startswith("I-") or before[1:] == tag[1:]


def test_every_premise_has_a_hypothesis_of_each_label() -> None:
    labels = ("entailment", "neutral", "contradiction")
    counted = Counter((row["premise"], row["label"]) for row in every("entailment"))
    assert set(counted.values()) == {1}
    assert {label for _, label in counted} == set(labels)
    assert len(counted) == 3 * len({premise for premise, _ in counted})


def test_texts_that_belong_together_differ_and_none_is_empty() -> None:
    pairs = [tuple(row["translation"].values()) for row in every("phrases")]
    pairs += [(row["dialogue"], row["summary"]) for row in every("dialogues")]
    pairs += [(row["question"], row["answer"]) for row in every("answers")]
    for first, second in pairs:
        assert first.strip() == first != second == second.strip()
        assert first
        assert second
    assert all(len(row["summary"]) < len(row["dialogue"]) for row in every("dialogues"))
