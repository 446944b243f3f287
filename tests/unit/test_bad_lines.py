"""Files with rows that no reader takes: the others are read, and keep their numbers."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

import banjoray.data.sources
from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from broken import (
    CONTEXT,
    LONG,
    LONG_TOLD,
    NO_NAME,
    SHAPES,
    Row,
    cells,
    job,
    line,
    listed,
    read_text,
    refused,
    splits_of,
)
from factories import write_rows

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("separator", [",", "\t"])
def test_rows_of_a_table_that_no_reader_takes_are_left_out(tmp_path: Path, separator: str) -> None:
    rows = ["text,label", "one,a", "too,many,b", "", "caf\udce9,b", "two,b", ",a", "three,a"]
    text = "\r\n".join(rows).replace(",", separator) + f'\r\n"four\n""lines"", {separator} b"{separator}b\r\n'
    name = "rows.csv" if separator == "," else "rows.tsv"
    told, splits = read_text(tmp_path, "text-classification", name, text.encode("utf-8", errors="surrogateescape"))
    assert told == (
        f"data: {name} can't be read: row 2 has 3 cells; the header has 2 "
        "(2 such rows in all; --skip-bad-rows leaves them out)"
    )
    assert cells(splits, "text") == ["one", "two", "three", f'four\n"lines", {separator} b']
    assert [(row["row"], row["reason"]) for row in listed(splits)] == [
        (2, "row 2 has 3 cells; the header has 2"),
        (3, "line 5 is not UTF-8 (byte 4 of the line)"),
        (5, "holds only blanks; needed text"),
    ]
    assert listed(splits, "validation") == listed(splits)


def test_a_long_text_in_a_table_and_a_byte_order_mark_do_not_hide_a_broken_row(tmp_path: Path) -> None:
    content = f"\ufefftext,label\none,a\n{LONG},b\ntwo,b\nx,y,z\n".encode()
    _, splits = read_text(tmp_path, "text-classification", "rows.csv", content)
    assert cells(splits, "text") == ["one", "two"]
    assert [row["row"] for row in listed(splits)] == [4, 2]


def test_a_header_that_is_not_utf8_is_refused_either_way(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"te\xffxt,label\none,a\n")
    files = {"train": tmp_path / "rows.csv"}
    told = [refused(job("text-classification", files, skip=skip)) for skip in (False, True)]
    assert told == ["data: rows.csv can't be read: line 1 is not UTF-8 (byte 3 of the line)"] * 2


@pytest.mark.parametrize("task", ["fill-mask", "text-generation"])
def test_lines_of_plain_text_are_rows(tmp_path: Path, task: str) -> None:
    content = b"one\n\ntw\xffo\nthree\r\n" + LONG.encode() + b"\nfour"
    changes: dict[str, Any] = {"columns": {}}
    told, splits = read_text(tmp_path, task, "rows.txt", content, **changes)
    assert told == "data: rows.txt can't be read: line 3 is not UTF-8 (byte 3 of the line)"
    assert cells(splits, "text") == ["one", "three", "four"]
    assert [(row["row"], row["reason"]) for row in listed(splits)] == [
        (3, "line 3 is not UTF-8 (byte 3 of the line)"),
        (2, "holds only blanks; needed text"),
        (5, LONG_TOLD),
    ]


def test_sentences_with_a_broken_line_are_left_out_and_keep_their_numbers(tmp_path: Path) -> None:
    good = b"Ada B-PER\nruns O\n\n"
    content = good + b"too many O\nmore O\n\n" + good + b"in O\n\xffUlm B-LOC\n\nalone\n\n" + good
    told, splits = read_text(tmp_path, "token-classification", "rows.conll", content)
    assert told == (
        "data: rows.conll can't be read: line 4 has 3 columns ('too many O'); needed 2, as the first word has "
        "(3 such rows in all; --skip-bad-rows leaves them out)"
    )
    assert cells(splits, "tokens") == [["Ada", "runs"]] * 3
    assert [(row["row"], row["reason"]) for row in listed(splits)] == [
        (2, "line 4 has 3 columns ('too many O'); needed 2, as the first word has"),
        (4, "line 11 is not UTF-8 (byte 1 of the line)"),
        (5, "line 13 has 1 column ('alone'); needed 2, as the first word has"),
    ]
    (tmp_path / "rows.conll").write_bytes(content.replace(b"runs O", b"runs B-V"))
    files = {"train": tmp_path / "rows.conll", "validation": tmp_path / "rows.conll"}
    told = refused(job("token-classification", files, labels=["O", "B-PER"]))
    assert told.startswith("data: none of the 6 rows of rows.conll can be used; the first: rows.conll: line 4 has")


def test_parts_of_the_nested_file_of_squad_are_left_out(tmp_path: Path) -> None:
    def asked(**changes: Any) -> dict[str, Any]:
        return {"id": "q", "question": "Where?", "answers": [{"text": "the Alps", "answer_start": 23}], **changes}

    questions = [asked(), asked(question=7), asked(answers=[{"text": "Bern", "answer_start": 0}]), asked(id="last")]
    tree = {"data": [{"paragraphs": [{"qas": []}, {"context": CONTEXT, "qas": questions}]}, "no article"]}
    told, splits = read_text(tmp_path, "question-answering", "dev.json", json.dumps(tree).encode())
    assert told == (
        "data: dev.json: data[0].paragraphs[0] holds keys ['qas']; needed 'context', as SQuAD's file has it "
        "(3 such rows in all; --skip-bad-rows leaves them out)"
    )
    assert cells(splits, "question") == ["Where?", "Where?"]
    assert splits.train.numbers is not None
    assert splits.train.numbers.tolist() == [0, 3]
    assert [(row["row"], row["column"], row["reason"]) for row in listed(splits)] == [
        (None, None, "data[0].paragraphs[0] holds keys ['qas']; needed 'context', as SQuAD's file has it"),
        (2, None, "data[0].paragraphs[1].qas[1].question holds 7; needed text"),
        (None, None, "data[1] holds 'no article'; needed 'paragraphs', as SQuAD's file has it"),
        (3, "answers", "says that 'Bern' is at character 0 of its context, which it does not have; there is 'The '"),
    ]


@pytest.mark.parametrize("content", [b'[{"text": "\xff"}]', b'{"data": [\n{"paragraphs": "\xff"}]}'])
def test_no_row_can_be_left_out_of_a_json_document_that_is_not_utf8(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dev.json").write_bytes(content)
    for skip in (False, True):
        told = refused(job("question-answering", {"train": tmp_path / "dev.json"}, skip))
        assert "dev.json can't be read: line" in told
        assert "is not UTF-8 (byte " in told


def test_a_cell_of_another_kind_far_down_is_left_out_and_numbers_with_a_point_are_not(tmp_path: Path) -> None:
    # More than the reader looks at before it decides what a column holds.
    filler = [
        {"text": f"{number} {'x' * 5000}", "label": "ab"[number % 2], "n": number % 3 / 2} for number in range(2200)
    ]
    rows: list[Row] = [
        {"text": "first", "label": "a", "n": 1},
        *filler,
        {"text": "odd", "label": "b", "n": {"deep": [1]}},
    ]
    rows += [{"text": "last", "label": "b", "n": 2}]
    path = write_rows(tmp_path / "train.jsonl", rows)
    files = {"train": path, "validation": path}
    assert (
        "train.jsonl can't be read: row 2202, column 'n' holds {'deep': [1]}; the rows before hold number"
        in refused(job("text-classification", files, skip=False))
    )
    splits = splits_of(job("text-classification", files))
    assert [row["row"] for row in listed(splits)] == [2202]
    assert len(splits.train) == 2202
    assert splits.train.rows[-1]["text"] == "last"


def test_rows_keep_their_numbers_through_everything_that_leaves_some_out(tmp_path: Path) -> None:
    held = [b"{broken", {"text": "x", "label": "a"}, {"text": " ", "label": "a"}, {"text": "y", "label": "c"}]
    (tmp_path / "held.jsonl").write_bytes(b"\n".join(line(row) for row in held) + line({"text": "z", "label": ""}))
    train = write_rows(tmp_path / "train.jsonl", SHAPES["text-classification"][1])
    splits = splits_of(job("text-classification", {"train": train, "validation": tmp_path / "held.jsonl"}))
    assert [(row["row"], row["reason"].split(";")[0]) for row in listed(splits, "validation")] == [
        (1, f"row 1 is {NO_NAME} 1)"),
        (3, "holds only blanks"),
        (4, "holds label 'c', which train never shows"),
        (5, "holds no label ('')"),
    ]
    assert listed(splits) == []
    assert splits.validation.rows.to_list() == [held[1]]


def test_a_row_that_stops_a_cut_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    rows = [{"text": "", "label": "a"}, *SHAPES["text-classification"][1], {"text": "more", "label": "a"}]
    path = write_rows(tmp_path / "train.jsonl", rows)
    told = refused(job("text-classification", {"train": path}))
    assert told.startswith(
        "data: train.jsonl has one row of a label (row 3), so it can't be in train and in validation"
    )


def test_labels_that_one_odd_row_made_numbers_with_a_point_are_still_labels(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": label} for label in (1, 0, 1.5, 0, 1)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    splits = splits_of(job("text-classification", {"train": path, "validation": path}))
    assert splits.labels == ("0", "1")
    assert splits.train.targets is not None
    assert splits.train.targets.tolist() == [1, 0, 0, 1]
    assert [row["row"] for row in listed(splits)] == [3]


def test_a_file_without_one_good_row_is_refused_though_bad_rows_are_skipped(tmp_path: Path) -> None:
    for rows, told in (
        ([{"text": " ", "label": "a"}] * 3, "data: none of the 3 rows of train.jsonl can be used; the first: "),
        ([b"{", b"[]"], "data: none of the 2 rows of train.jsonl can be read; the first: train.jsonl: row 1 is not"),
    ):
        (tmp_path / "train.jsonl").write_bytes(b"".join(map(line, rows)))
        assert refused(job("text-classification", {"train": tmp_path / "train.jsonl"})).startswith(told)


def test_good_rows_are_not_looked_at_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: Any) -> Any:
        raise AssertionError("a row was looked at")

    monkeypatch.setattr(banjoray.data.sources, "records", no)
    monkeypatch.setattr(banjoray.data.sources, "text_problem", no)
    path = write_rows(tmp_path / "train.jsonl", SHAPES["text-classification"][1] * 20)
    assert splits_of(job("text-classification", {"train": path, "validation": path})).left_out == ()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo for one test what `use_hub` did to the process before."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
def test_a_file_behind_a_url_is_read_around_its_bad_rows_too_and_its_copy_is_made_once(tmp_path: Path) -> None:
    import datasets

    url = f"memory://{tmp_path.name}/rows.jsonl"
    with fsspec.open(url, "wb") as file:
        file.write(b"".join(map(line, [*SHAPES["fill-mask"][1], b"{"])))
    tree = {"name": "t", "task": "fill-mask", "data": {"files": {"train": url, "validation": url}}}
    made = validate(JobConfig, tree, "job").with_values({"data.skip_bad_rows": True})
    assert cells(splits_of(made), "text") == ["one two", "three"]
    copies = Path(datasets.config.HF_DATASETS_CACHE) / "banjoray"
    before = {path: path.stat().st_mtime_ns for path in copies.iterdir()}
    assert [row["row"] for row in listed(splits_of(made))] == [3]
    assert {path: path.stat().st_mtime_ns for path in copies.iterdir()} == before
