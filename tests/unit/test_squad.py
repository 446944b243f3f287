"""SQuAD's rows and its nested file: what is read, and what is refused, with file and row."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from banjoray.config.job import JobConfig
from banjoray.data.splits import Splits
from banjoray.errors import DataError
from banjoray.tasks.question_answering import QuestionAnswering

CONTEXT = "The river Aar rises in the Alps and joins the Rhine."


def answers(*texts: str) -> dict[str, list[Any]]:
    return {"text": list(texts), "answer_start": [CONTEXT.index(text) for text in texts]}


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "q1", "question": "Where does it rise?", "context": CONTEXT, "answers": answers("the Alps")} | changes


def job(path: Path, **columns: str) -> JobConfig:
    return JobConfig.model_validate(
        {
            "name": "t",
            "task": "question-answering",
            "data": {"files": {"train": str(path), "validation": str(path)}, "columns": columns},
        }
    )


def splits(path: Path, **columns: str) -> Splits:
    return QuestionAnswering().splits(job(path, **columns))


def written(folder: Path, rows: list[dict[str, Any]], suffix: str = ".jsonl") -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in rows), encoding="utf-8")
    return path


def cells(split: Any) -> list[tuple[Any, ...]]:
    (batch,) = split.batches(100)
    return list(zip(batch["question"], batch["context"], batch["answers"], strict=True))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_rows_keep_their_answers_and_no_answers(tmp_path: Path, suffix: str) -> None:
    found = [row(), row(question="Which two?", answers=answers("Aar", "the Rhine")), row(answers=answers())]
    read = splits(written(tmp_path, found, suffix))
    assert cells(read.train) == [(line["question"], CONTEXT, line["answers"]) for line in found]
    assert read.labels == ()
    assert read.train.fingerprint() == read.validation.fingerprint()


def test_a_row_that_says_nothing_of_answers_has_none(tmp_path: Path) -> None:
    read = splits(written(tmp_path, [row(), row(answers=None), row(answers={})]))
    assert [found for _, _, found in cells(read.train)][1] is None


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    line = {"q": "Where?", "passage": CONTEXT, "gold": answers("the Alps")}
    read = splits(written(tmp_path, [line]), question="q", context="passage", answers="gold")
    assert cells(read.train) == [("Where?", CONTEXT, answers("the Alps"))]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"answers": {"text": ["the Alps"], "answer_start": [24]}}, "says that 'the Alps' is at character 24"),
        ({"answers": {"text": ["the Alps"], "answer_start": [24]}}, "which stands at 23; there is 'he Alps '"),
        ({"answers": {"text": ["Bern"], "answer_start": [0]}}, "which it does not have; there is 'The '"),
        ({"answers": {"text": ["Aar"], "answer_start": [-5]}}, "holds -5 in answer_start"),
        ({"answers": {"text": ["Aar"], "answer_start": [9999]}}, "there is ''"),
        ({"answers": {"text": ["Aar", "Alps"], "answer_start": [10]}}, "holds 2 in text and 1 in answer_start"),
        ({"answers": {"text": ["Aar", " "], "answer_start": [10, 3]}}, "holds ' ' in text; needed text"),
        ({"answers": {"text": ["Aar", None], "answer_start": [10, 3]}}, "holds None in text; needed text"),
        ({"answers": {"text": ["Aar"], "answer_start": [None]}}, "holds None in answer_start"),
    ],
)
def test_an_answer_that_is_none_is_refused_with_file_row_and_id(tmp_path: Path, wrong: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        splits(written(tmp_path, [row(), row(), row(id="q3", **wrong)]))
    assert str(caught.value).startswith("data: rows.jsonl row 3 (id q3), column 'answers' ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("the Alps", 'holds \'the Alps\'; needed {"text": [...], "answer_start": [...]}'),
        (["the Alps"], "holds ['the Alps']; needed"),
        ({"text": "the Alps", "answer_start": 23}, "needed two lists"),
        ({"text": ["the Alps"]}, "holds {'text': ['the Alps']}; needed"),
        ({"text": ["the Alps"], "answer_start": ["23"]}, "holds '23' in answer_start; needed a whole number"),
        ({"text": ["the Alps"], "answer_start": [23.0]}, "holds 23.0 in answer_start; needed a whole number"),
        ({"text": [7], "answer_start": [23]}, "holds 7 in text; needed text"),
    ],
)
def test_another_kind_of_answers_is_refused(tmp_path: Path, column: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        splits(written(tmp_path, [row(answers=column)]))
    assert str(caught.value).startswith("data: rows.jsonl row 1 (id q1), column 'answers' ")
    assert message in str(caught.value)


@pytest.mark.parametrize("column", ["question", "context"])
def test_a_blank_question_or_context_is_refused(tmp_path: Path, column: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl row 2, column '{column}' holds only blanks"):
        splits(written(tmp_path, [row(), row(**{column: "  "})]))


def test_a_missing_column_is_named_with_the_key_that_says_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 'context' not in rows\.jsonl; .* Set data\.columns\.context=NAME"):
        splits(written(tmp_path, [{"question": "q", "answers": answers()}]))


def test_rows_have_the_numbers_of_the_file_where_validation_is_cut_off_train(tmp_path: Path) -> None:
    path = written(tmp_path, [row()] * 19 + [row(answers={"text": ["x"], "answer_start": [0]})])
    alone = job(path).with_values({"data.files.validation": None})
    with pytest.raises(DataError, match=r"rows\.jsonl row 20 "):
        QuestionAnswering().splits(alone)


def nested(*asked: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"data": [{"title": "Rivers", "paragraphs": [{"context": CONTEXT, "qas": list(asked)}]}]} | rest


def question(**changes: Any) -> dict[str, Any]:
    told = {"id": "q1", "question": "Where?", "answers": [{"text": "the Alps", "answer_start": 23}]}
    return told | changes


def test_the_nested_file_of_squad_is_read_as_rows(tmp_path: Path) -> None:
    tree = nested(
        question(),
        question(id="q2", answers=[{"text": "Aar", "answer_start": 10}, {"text": "river Aar", "answer_start": 4}]),
        question(id="q3", is_impossible=True, answers=[], plausible_answers=[{"text": "Aar", "answer_start": 10}]),
        question(id="q4", is_impossible=False),
        version="v2.0",
    )
    tree["data"].append({"title": "None", "paragraphs": [{"context": "Nothing here.", "qas": []}]})
    path = tmp_path / "train-v2.0.json"
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    read = splits(path, question="asked")
    texts = [found["text"] for _, _, found in cells(read.train)]
    assert texts == [["the Alps"], ["Aar", "river Aar"], [], ["the Alps"]]
    assert {context for _, context, _ in cells(read.train)} == {CONTEXT}
    flat = [row(id=str(n), question="Where?", answers=found) for n, (_, _, found) in enumerate(cells(read.train))]
    assert splits(written(tmp_path, flat)).fingerprint() == read.fingerprint()


def test_a_nested_file_without_any_answer_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    path.write_text(json.dumps(nested(question(is_impossible=True, answers=[]))), encoding="utf-8")
    assert [found for _, _, found in cells(splits(path).train)] == [answers()]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            nested(question(answers=[{"text": "Alps", "answer_start": 0}])),
            "nested.json row 1 (id q1), column 'answers'",
        ),
        (nested({"id": "q1", "answers": []}), "nested.json: data[0].paragraphs[0].qas[0] holds keys ['answers', 'id']"),
        (
            nested(question(), {"id": "q1", "question": "q"}),
            "data[0].paragraphs[0].qas[1] holds keys ['id', 'question']",
        ),
        (nested("q"), "qas[0] holds 'q'; needed 'question'"),  # type: ignore[arg-type]
        (nested(question(question=7)), "qas[0].question holds 7; needed text"),
        (nested(question(answers={"text": "Aar"})), "qas[0].answers holds {'text': 'Aar'}; needed a list"),
        (nested(question(answers=[{"text": "Aar"}])), "qas[0].answers[0] holds keys ['text']; needed 'answer_start'"),
        (nested(question(answers=[{"text": "Aar", "answer_start": "10"}])), "answer_start holds '10'; needed a whole"),
        (nested(question(answers=[{"text": "Aar", "answer_start": True}])), "answer_start holds True; needed a whole"),
        (nested(question(is_impossible=True)), "qas[0] has answers and is_impossible"),
        (nested(question(question="half \ud83d")), "holds half a character"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, "data[0].paragraphs[0] holds keys ['qas']; needed 'context'"),
        ({"data": [{"paragraphs": []}, {"title": "x"}]}, "data[1] holds keys ['title']; needed 'paragraphs'"),
        ({"data": [{"paragraphs": []}]}, "nested.json has no rows"),
    ],
)
def test_a_part_of_the_nested_file_that_is_not_squads_is_named(tmp_path: Path, tree: Any, message: str) -> None:
    path = tmp_path / "nested.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        splits(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith("data: nested.json")


def test_a_json_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(nested(question()))[:-9], encoding="utf-8")
    with pytest.raises(DataError, match=r"cut\.json can't be read"):
        splits(path)
