"""Words with tags, from lists, CoNLL files and spans of characters; what can't be used is refused by file and row."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from banjoray.config.job import JobConfig
from banjoray.data.spans import pieces
from banjoray.data.splits import Split, Splits
from banjoray.data.tags import tagged_splits
from banjoray.errors import DataError
from factories import write_rows

pytestmark = pytest.mark.usefixtures("own_cache")

GOOD = {"tokens": ["Ada", "meets", "Bo"], "tags": ["B-PER", "O", "B-PER"]}
MORE = {"tokens": ["in", "New", "Ulm"], "tags": ["O", "B-LOC", "I-LOC"]}
CONLL = "-DOCSTART- -X- O\n\nAda NNP B-PER\nmeets VBZ O\n\n\nin IN O\nNew NNP B-LOC\nUlm NNP I-LOC\n"


def job_of(files: Mapping[str, Path], **data: Any) -> JobConfig:
    named = {split: str(path) for split, path in files.items()}
    tree = {"name": "t", "task": "token-classification", "data": {"files": named, **data}, "hub": {"offline": True}}
    return JobConfig.model_validate(tree)


def read(
    folder: Path, train: Sequence[Mapping[str, Any]], held: Sequence[Mapping[str, Any]] = (), **data: Any
) -> Splits:
    files = {"train": write_rows(folder / "train.jsonl", train)}
    files["validation"] = write_rows(folder / "held.jsonl", held or train)
    return tagged_splits(job_of(files, **data))


def read_text(folder: Path, name: str, text: str | bytes, **data: Any) -> Splits:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return tagged_splits(job_of({"train": path, "validation": path}, **data))


def names_of(splits: Splits, split: str = "train") -> list[list[str]]:
    return [[splits.labels[tag] for tag in tags] for tags in splits.get(split).added["tags"]]


def words_of(split: Split) -> list[list[str]]:
    [batch] = split.batches(1000)
    return [list(words) for words in batch["tokens"]]


def test_labels_are_o_first_then_the_others_sorted_and_tags_are_their_numbers(tmp_path: Path) -> None:
    splits = read(tmp_path, [GOOD, MORE])
    assert splits.labels == ("O", "B-LOC", "B-PER", "I-LOC")
    assert splits.train.added["tags"] == [[2, 0, 2], [0, 1, 3]]
    assert words_of(splits.train) == [GOOD["tokens"], MORE["tokens"]]


def test_columns_may_have_other_names_and_labels_another_order(tmp_path: Path) -> None:
    rows = [{"words": row["tokens"], "ner": row["tags"]} for row in (GOOD, MORE)]
    labels = ["B-PER", "I-PER", "I-LOC", "O", "B-LOC"]
    splits = read(tmp_path, rows, columns={"tokens": "words", "tags": "ner"}, labels=labels)
    assert splits.labels == tuple(labels)
    assert names_of(splits) == [GOOD["tags"], MORE["tags"]]


def test_numbers_have_the_names_that_the_data_set_declares_in_whatever_order_data_labels_has_them(
    tmp_path: Path,
) -> None:
    declared = ["O", "B-PER", "I-PER"]
    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "tags": datasets.Sequence(datasets.ClassLabel(names=declared)),
        }
    )
    rows = datasets.Dataset.from_dict({"tokens": [["Ada", "Lund", "runs"]] * 2, "tags": [[1, 2, 0]] * 2}, features)
    rows.to_parquet(tmp_path / "train.parquet")
    files = {"train": tmp_path / "train.parquet", "validation": tmp_path / "train.parquet"}
    assert tagged_splits(job_of(files)).labels == tuple(declared)
    turned = tagged_splits(job_of(files, labels=["I-PER", "O", "B-PER"]))
    assert turned.train.added["tags"] == [[2, 0, 1]] * 2
    assert names_of(turned) == names_of(tagged_splits(job_of(files))) == [["B-PER", "I-PER", "O"]] * 2


def test_numbers_without_names_count_along_data_labels(tmp_path: Path) -> None:
    rows = [{"tokens": ["Ada", "runs"], "tags": [1, 0]}]
    assert names_of(read(tmp_path, rows, labels=["O", "B-PER"])) == [["B-PER", "O"]]
    with pytest.raises(DataError, match=r"train.jsonl row 1, column 'tags', tag 1 is the number 1, .* set data.labels"):
        read(tmp_path, rows)
    with pytest.raises(DataError, match=r"row 1, column 'tags', tag 2 is the number 7; there are names for 0 to 1"):
        read(tmp_path, [{"tokens": ["Ada", "runs"], "tags": [1, 7]}], labels=["O", "B-PER"])


def test_tags_need_not_be_of_entities(tmp_path: Path) -> None:
    assert read(tmp_path, [{"tokens": ["Ada", "runs"], "tags": ["PROPN", "VERB"]}]).labels == ("PROPN", "VERB")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["Ada", "runs"], "tags": ["O"]}, "column 'tags' holds 1 tags for 2 words; needed a tag for every"),
        ({"tokens": ["Ada"], "tags": ["O", "O"]}, "column 'tags' holds 2 tags for 1 words"),
        ({"tokens": [], "tags": []}, "column 'tokens' holds no words"),
        ({"tokens": [" ", "\u00a0"], "tags": ["O", "O"]}, "column 'tokens' holds only blanks"),
        ({"tokens": None, "tags": ["O"]}, "column 'tokens' holds None; needed a list of words"),
        ({"tokens": ["Ada"], "tags": None}, "column 'tags' holds None; needed a list with a tag for every word"),
        ({"tokens": ["Ada", None], "tags": ["O", "O"]}, "column 'tokens', word 2 is None; needed text"),
        ({"tokens": ["Ada", "Bo"], "tags": ["O", None]}, "column 'tags', tag 2 is None; needed a name"),
        ({"tokens": ["Ada", "Bo"], "tags": ["O", " "]}, "column 'tags', tag 2 is ' '; needed a name"),
    ],
)
def test_a_row_that_can_not_be_used_is_named_with_its_file(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, [GOOD, MORE], [GOOD, MORE, row])
    assert str(caught.value).startswith(f"data: held.jsonl row 3, {words}")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"tokens": "Ada runs", "tags": ["O"]}], "column 'tokens' holds 'Ada runs'; needed a list of words"),
        ([{"tokens": ["Ada"], "tags": "O"}], "column 'tags' holds 'O'; needed a list with a tag for every word"),
        ([{"tokens": [1, 2], "tags": ["O", "O"]}], "column 'tokens', word 1 is 1; needed text"),
        ([{"tokens": ["Ada"], "tags": [1.5]}], "column 'tags', tag 1 is 1.5; needed a name, or a number that has one"),
        ([{"tokens": ["Ada"], "tags": [True]}], "column 'tags', tag 1 is True; needed a name, or a number"),
        ([{"tokens": [["Ada"]], "tags": ["O"]}], "column 'tokens', word 1 is ['Ada']; needed text"),
    ],
)
def test_columns_of_another_kind_are_refused(tmp_path: Path, rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, rows)
    assert str(caught.value).startswith(f"data: train.jsonl row 1, {words}")


def test_a_tag_that_train_never_shows_is_refused_unless_data_labels_lists_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"held.jsonl row 2, column 'tags' holds the tag 'B-LOC', which train never sho"
    ):
        read(tmp_path, [GOOD], [GOOD, MORE])
    labels = ["O", "B-PER", "B-LOC", "I-LOC"]
    assert names_of(read(tmp_path, [GOOD], [GOOD, MORE], labels=labels), "validation") == [GOOD["tags"], MORE["tags"]]
    with pytest.raises(
        DataError, match=r"train.jsonl row 1, column 'tags' holds the tag 'B-PER', which data.labels doe"
    ):
        read(tmp_path, [GOOD], labels=["O", "B-LOC"])
    with pytest.raises(DataError, match=r"data.labels: a name stands twice"):
        read(tmp_path, [GOOD], labels=["O", "B-PER", "O"])


def test_data_with_one_tag_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl shows one tag, 'O'; there is nothing to tell apart"):
        read(tmp_path, [{"tokens": ["a"], "tags": ["O"]}])
    with pytest.raises(DataError, match=r"train.jsonl shows no spans"):
        read(tmp_path, [{"text": "a", "spans": []}], columns={"spans": "spans"})


def test_a_missing_column_is_refused_with_the_key_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"column 'tags' not in train.jsonl; it has 'ner', 'tokens'. Set data.columns.ta"
    ):
        read(tmp_path, [{"ner": ["O"], "tokens": ["a"]}])


def test_validation_is_cut_off_train_and_tags_stay_with_their_words(tmp_path: Path) -> None:
    rows = [{"tokens": [f"w{number}", "x"], "tags": [f"B-{number % 3}", "O"]} for number in range(40)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    splits = tagged_splits(job_of({"train": path}, validation_fraction=0.25))
    assert (len(splits.train), len(splits.validation)) == (30, 10)
    for split in ("train", "validation"):
        for words, tags in zip(words_of(splits.get(split)), names_of(splits, split), strict=True):
            assert tags == [f"B-{int(words[0][1:]) % 3}", "O"]
    other = tagged_splits(job_of({"train": path}, validation_fraction=0.25))
    assert other.fingerprint() == splits.fingerprint()


def test_the_fingerprint_knows_tags_and_spans(tmp_path: Path) -> None:
    first = read(tmp_path / "a", [GOOD, MORE])
    other = read(tmp_path / "b", [GOOD | {"tags": ["B-PER", "O", "O"]}, MORE])
    assert first.train.fingerprint() != other.train.fingerprint()
    assert read(tmp_path / "c", [GOOD, MORE]).fingerprint() == first.fingerprint()


@pytest.mark.parametrize("suffix", [".conll", ".iob", ".bio"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("between", [" ", "\t"])
def test_conll_files_give_their_first_and_last_column(tmp_path: Path, suffix: str, ends: str, between: str) -> None:
    text = CONLL.replace("\n", ends).replace(" ", between)
    splits = read_text(tmp_path, f"train{suffix}", text)
    assert words_of(splits.train) == [["Ada", "meets"], ["in", "New", "Ulm"]]
    assert names_of(splits) == [["B-PER", "O"], ["O", "B-LOC", "I-LOC"]]
    assert splits.train.fingerprint() == read_text(tmp_path, "again.conll", CONLL).train.fingerprint()


def test_conll_words_may_hold_anything_but_blanks(tmp_path: Path) -> None:
    text = "\ufeff10\u00a0km B-Q\n\u2028 O\n\ufe0f O\n# O"
    assert words_of(read_text(tmp_path, "a.conll", text).train) == [["10\u00a0km", "\u2028", "\ufe0f", "#"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ada B-PER\nruns\n", "a.conll can't be read: line 2 has 1 column ('runs'); needed 2, as the first word has"),
        ("Ada\nruns O\n", "a.conll can't be read: line 1 has 1 column ('Ada'); needed a word and its tag"),
        ("Ada B-PER\n\nruns O O\n", "a.conll can't be read: line 3 has 3 columns ('runs O O'); needed 2"),
        (b"Ada B-PER\nru\xffns O\n", "a.conll can't be read: line 2 is not UTF-8 (byte 3 of the line)"),
        ("\n-DOCSTART- O\n\n", "a.conll has no rows"),
    ],
)
def test_a_line_that_is_no_word_and_tag_is_named(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_text(tmp_path, "a.conll", text)
    assert str(caught.value).startswith(f"data: {words}")


def test_a_sentence_of_a_conll_file_is_found_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.conll row 2 \(from line 7\), column 'tags' holds the tag 'B-LOC'"):
        read_text(tmp_path, "a.conll", CONLL, labels=["O", "B-PER"])


TEXT = "Ada Lund's flat in São Paulo, 10mg."
SPANS = [{"start": 19, "end": 28, "label": "LOC"}, {"start": 0, "end": 8, "label": "PER"}]


def read_spans(folder: Path, rows: Sequence[Mapping[str, Any]], **data: Any) -> Splits:
    return read(folder, rows, columns={"spans": "spans"}, **data)


def cells(splits: Splits) -> list[list[tuple[str, str]]]:
    """(word, tag) of every row."""
    [batch] = splits.train.batches(1000)
    rows = zip(batch["text"], batch["starts"], batch["ends"], names_of(splits), strict=True)
    return [
        [(text[start:end], tag) for start, end, tag in zip(starts, ends, tags, strict=True)]
        for text, starts, ends, tags in rows
    ]


def test_spans_become_tags_of_the_words_that_they_cover(tmp_path: Path) -> None:
    splits = read_spans(tmp_path, [{"text": TEXT, "spans": SPANS}, {"text": "none here", "spans": []}])
    assert splits.labels == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
    tagged = cells(splits)
    assert tagged[0][:4] == [("Ada", "B-PER"), ("Lund", "I-PER"), ("'", "O"), ("s", "O")]
    assert tagged[0][6:9] == [("São", "B-LOC"), ("Paulo", "I-LOC"), (",", "O")]
    assert tagged[1] == [("none", "O"), ("here", "O")]


def test_words_are_cut_where_a_span_begins_or_ends_and_neighbours_stay_apart(tmp_path: Path) -> None:
    spans = [{"start": 30, "end": 32, "label": "NUM"}, {"start": 32, "end": 34, "label": "NUM"}]
    assert cells(read_spans(tmp_path, [{"text": TEXT, "spans": spans}]))[0][-3:] == [
        ("10", "B-NUM"),
        ("mg", "B-NUM"),
        (".", "O"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("don't 3.5 a_b", ["don", "'", "t", "3", ".", "5", "a_b"]),
        ("我在Oslo工作", ["我", "在", "Oslo", "工", "作"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("e\u0301te\u0301 \u2764\ufe0f!", ["e\u0301te\u0301", "\u2764\ufe0f", "!"]),
        (" \t\n", []),
        ("\u0301a", ["\u0301", "a"]),
    ],
)
def test_the_words_of_a_text(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in pieces(text, ())] == words


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([{"start": 0, "end": 99, "label": "A"}], "column 'spans', span 1 is [0, 99); needed 0 <= start < end <= 35"),
        ([{"start": -1, "end": 3, "label": "A"}], "column 'spans', span 1 is [-1, 3)"),
        ([{"start": 3, "end": 3, "label": "A"}], "column 'spans', span 1 is [3, 3)"),
        ([{"start": 5, "end": 4, "label": "A"}], "column 'spans', span 1 is [5, 4)"),
        ([{"start": 3, "end": 4, "label": "A"}], "column 'spans', span 1 is [3, 4), which covers blanks only"),
        ([*SPANS, {"start": 7, "end": 10, "label": "A"}], "column 'spans': [0, 8) 'PER' and [7, 10) 'A' overlap"),
        ([{"start": 0, "end": 3, "label": None}], "column 'spans', span 1: label is None; needed a name"),
        ([{"start": 0, "end": 3, "label": ""}], "column 'spans', span 1: label is ''; needed a name"),
        ([{"start": 0, "end": None, "label": "A"}], "column 'spans', span 1: end is None; needed a number of char"),
        (None, "column 'spans' holds None; needed a list of"),
    ],
)
def test_a_span_that_can_not_be_used_is_named_with_file_and_row(tmp_path: Path, spans: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_spans(tmp_path, [{"text": TEXT, "spans": SPANS}, {"text": TEXT, "spans": spans}])
    assert str(caught.value).startswith(f"data: train.jsonl row 2, {words}")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": TEXT, "spans": [{"start": 0.5, "end": 3, "label": "A"}]}, "span 1: start is 0.5"),
        ({"text": TEXT, "spans": [{"start": 0, "label": "A"}]}, "span 1 is {'start': 0, 'label': 'A'}; needed"),
        ({"text": TEXT, "spans": [[0, 3]]}, "span 1 is [0, 3]; needed"),
        ({"text": TEXT, "spans": ["Ada"]}, "span 1 is 'Ada'; needed"),
        ({"text": "cafe\u0301 in", "spans": [{"start": 0, "end": 4, "label": "A"}]}, "4 is inside a character of"),
        (
            {"text": "\U0001f469\u200d\U0001f4bb x", "spans": [{"start": 2, "end": 3, "label": "A"}]},
            "2 is inside a cha",
        ),
        ({"text": "  ", "spans": []}, "column 'text' holds only blanks"),
    ],
)
def test_spans_of_another_shape_and_edges_inside_a_character_are_refused(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_spans(tmp_path, [row])
    assert "train.jsonl" in str(caught.value)
    assert words in str(caught.value)


def test_labels_for_spans_have_to_hold_o(tmp_path: Path) -> None:
    rows = [{"text": TEXT, "spans": SPANS}]
    with pytest.raises(DataError, match=r"data.labels: found PER, LOC; needed 'O' too"):
        read_spans(tmp_path, rows, labels=["PER", "LOC"])
    with pytest.raises(
        DataError, match=r"row 1, column 'spans' holds the tag 'B-LOC', which data.labels does not list"
    ):
        read_spans(tmp_path, rows, labels=["O", "B-PER", "I-PER"])


def test_numbers_of_spans_have_the_names_that_the_data_set_declares(tmp_path: Path) -> None:
    span = {"start": datasets.Value("int64"), "end": datasets.Value("int64")}
    label = {"label": datasets.ClassLabel(names=["PER", "LOC"])}
    features = datasets.Features({"text": datasets.Value("string"), "spans": [span | label]})
    spans = [{"start": 0, "end": 3, "label": 1}]
    datasets.Dataset.from_dict({"text": ["Ada in"], "spans": [spans]}, features).to_parquet(tmp_path / "a.parquet")
    files = {"train": tmp_path / "a.parquet", "validation": tmp_path / "a.parquet"}
    splits = tagged_splits(job_of(files, columns={"spans": "spans"}))
    assert splits.labels == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
    assert names_of(splits) == [["B-LOC", "O"]]
    assert json.loads(json.dumps(splits.train.added["tags"])) == [[1, 0]]
