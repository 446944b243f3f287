"""Label names and their order, labels that don't fit, the stratified cut, and fingerprints of rows."""

import csv
import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.data.splits import Split, Splits, labelled_splits
from banjoray.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")


class Folder:
    """A folder of data files, and jobs over them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._numbers = count(1)

    def labels(self, labels: Sequence[Any], kind: str = "jsonl") -> str:
        """A file with one row for each label; text ``i`` is "text i"."""
        return self.rows([{"text": f"text {number}", "label": label} for number, label in enumerate(labels)], kind)

    def rows(self, rows: Sequence[dict[str, Any]], kind: str = "jsonl") -> str:
        path = self._path / f"{next(self._numbers)}.{kind}"
        if kind == "csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, rows[0])
                table.writeheader()
                table.writerows(rows)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    def classes(self, names: list[str], ids: list[int]) -> str:
        """A parquet file whose label column names its numbers, as data sets on the hub do."""
        path = str(self._path / f"{next(self._numbers)}.parquet")
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = {"text": [f"text {number}" for number in range(len(ids))], "label": ids}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
        return path

    def job(self, train: str, validation: str | None = None, **data: Any) -> JobConfig:
        seed = data.pop("seed", 0)
        files = {"train": train, "validation": validation}
        tree = {"name": "t", "task": "text-classification", "data": {"files": files} | data, "train": {"seed": seed}}
        return validate(JobConfig, tree, "job")

    def splits(self, train: str, validation: str | None = None, **data: Any) -> Splits:
        return labelled_splits(self.job(train, validation, **data))

    def refusal(self, train: str, validation: str | None = None, **data: Any) -> str:
        with pytest.raises(DataError) as caught:
            self.splits(train, validation, **data)
        return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def named(splits: Splits, split: Split) -> list[str]:
    """The label name of every row."""
    return [splits.labels[target] for target in ids(split)]


def ids(split: Split) -> list[int]:
    """The label id of every row."""
    assert split.targets is not None
    return [int(target) for target in split.targets]


def test_label_names_are_sorted(folder: Folder) -> None:
    given = ["b", "a", "c", "b"]
    splits = folder.splits(folder.labels(given), folder.labels(["c", "a"]))
    assert splits.labels == ("a", "b", "c")
    assert named(splits, splits.train) == given
    assert named(splits, splits.validation) == ["c", "a"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_label_numbers_are_sorted_as_numbers(folder: Folder, kind: str) -> None:
    splits = folder.splits(folder.labels([10, 9, 2, -1], kind), folder.labels([2, 10], kind))
    assert splits.labels == ("-1", "2", "9", "10")
    assert named(splits, splits.train) == ["10", "9", "2", "-1"]
    assert named(splits, splits.validation) == ["2", "10"]


def test_the_jobs_own_label_order_counts(folder: Folder) -> None:
    splits = folder.splits(folder.labels(["b", "a"]), folder.labels(["a", "b"]), labels=["b", "a"])
    assert splits.labels == ("b", "a")
    assert ids(splits.train) == [0, 1]
    assert ids(splits.validation) == [1, 0]


def test_numbers_in_the_data_count_through_the_jobs_label_names(folder: Folder) -> None:
    splits = folder.splits(folder.labels([1, 0], "csv"), folder.labels([0, 1]), labels=["sad", "glad"])
    assert named(splits, splits.train) == ["glad", "sad"]
    assert named(splits, splits.validation) == ["sad", "glad"]


def test_a_data_set_that_names_its_numbers_keeps_its_order(folder: Folder) -> None:
    splits = folder.splits(folder.classes(["pos", "neg"], [0, 1, 1]), folder.labels(["neg", "pos"]))
    assert splits.labels == ("pos", "neg")
    assert named(splits, splits.train) == ["pos", "neg", "neg"]
    assert named(splits, splits.validation) == ["neg", "pos"]


def test_named_numbers_keep_their_names_under_another_order(folder: Folder) -> None:
    """In the job, and in a validation file whose numbers mean something else than train's."""
    train, validation = folder.classes(["pos", "neg"], [0, 1, 1]), folder.classes(["neg", "pos"], [0, 1])
    for labels in (None, ["neg", "pos"], ["pos", "neg"]):
        splits = folder.splits(train, validation, labels=labels)
        assert named(splits, splits.train) == ["pos", "neg", "neg"]
        assert named(splits, splits.validation) == ["neg", "pos"]


def test_blanks_around_a_label_do_not_make_another_label(folder: Folder) -> None:
    splits = folder.splits(folder.labels(["a", " a", "b", "b "]), folder.labels(["a ", "b"]))
    assert splits.labels == ("a", "b")
    assert named(splits, splits.train) == ["a", "a", "b", "b"]


def test_a_label_that_train_never_shows_is_refused_with_file_and_row(folder: Folder) -> None:
    train = folder.labels(["a", "b"])
    message = folder.refusal(train, folder.labels(["a", "b", "c"]))
    assert message == "data: 2.jsonl row 3, column 'label' holds label 'c', which train never shows; it shows a, b"
    message = folder.refusal(train, folder.labels(["a", "b", "c"]), labels=["a", "b", "c"])
    assert message == "data: 3.jsonl row 3 holds label 'c', which train never shows; it shows a, b"


def test_a_label_that_the_job_does_not_list_is_refused(folder: Folder) -> None:
    assert "1.jsonl row 3, column 'label' holds label 'c'" in folder.refusal(folder.labels("abc"), labels=["a", "b"])


@pytest.mark.parametrize(
    ("labels", "row", "found"), [(["a", None, "b"], 2, "None"), (["a", "b", ""], 3, "''"), ([" ", "a", "b"], 1, "' '")]
)
def test_a_missing_label_is_refused_with_file_and_row(
    folder: Folder, labels: list[str | None], row: int, found: str
) -> None:
    words = f"row {row}, column 'label' holds no label ({found}); needed one of a, b"
    assert folder.refusal(folder.labels(labels)) == f"data: 1.jsonl {words}"
    assert folder.refusal(folder.labels(["a", "b"]), folder.labels(labels)) == f"data: 3.jsonl {words}"


def test_an_empty_label_cell_is_no_label(folder: Folder) -> None:
    assert "row 2, column 'label' holds no label ('')" in folder.refusal(folder.labels(["a", "", "b", "b"], "csv"))


def test_an_unlabelled_row_of_a_data_set_is_refused(folder: Folder) -> None:
    # -1 is how data sets on the hub mark rows of a test set whose labels are kept back.
    message = folder.refusal(folder.classes(["pos", "neg"], [0, 1, -1]))
    assert message == "data: 1.parquet row 3, column 'label' holds no label (-1); needed one of pos, neg"


@pytest.mark.parametrize(
    ("labels", "row"), [(["a", "b", 3], 3), ([0, 1, "b"], 3), ([1.5, 2.0], 1), ([["a"], ["b"]], 1)]
)
def test_labels_that_are_neither_names_nor_whole_numbers_are_refused(
    folder: Folder, labels: list[Any], row: int
) -> None:
    words = (
        f"data: 1.jsonl row {row}, column 'label' holds {labels[row - 1]!r}; needed a label's name, or a whole number"
    )
    assert folder.refusal(folder.labels(labels)).startswith(words)


def test_one_label_is_refused(folder: Folder) -> None:
    message = folder.refusal(folder.labels(["a", "a", "a"]))
    assert message == "data: 1.jsonl shows one ('a') label; needed at least two"
    assert "shows one ('b') label" in folder.refusal(folder.labels(["b", "b"]), labels=["a", "b"])


def test_a_label_name_given_twice_is_refused(folder: Folder) -> None:
    assert folder.refusal(folder.labels(["a", "b"]), labels=["a", "b", "a"]).startswith(
        "data.labels: a name stands twice"
    )


CLASSES = {"rare": 2, "some": 20, "many": 61}


def uneven(folder: Folder) -> str:
    """Rows of three classes, mixed, with texts that are all different."""
    labels = [label for label, rows in CLASSES.items() for _ in range(rows)]
    return folder.labels(np.random.default_rng(1).permutation(labels).tolist())


def texts(split: Split) -> list[str]:
    return [text for batch in split.batches(7) for text in batch["text"]]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.9])
def test_the_cut_takes_the_same_share_of_every_class(folder: Folder, fraction: float) -> None:
    splits = folder.splits(uneven(folder), validation_fraction=fraction)
    for label, rows in CLASSES.items():
        taken = named(splits, splits.validation).count(label)
        assert taken + named(splits, splits.train).count(label) == rows
        # Both sides see every class, whatever the fraction.
        assert taken == min(max(1, round(fraction * rows)), rows - 1)


def test_the_cut_splits_the_rows_without_loss_and_keeps_their_order_and_labels(folder: Folder) -> None:
    file = uneven(folder)
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    label = {row["text"]: row["label"] for row in rows}
    splits = folder.splits(file, validation_fraction=0.2)
    train, validation = texts(splits.train), texts(splits.validation)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(label)
    for split in (splits.train, splits.validation):
        assert texts(split) == sorted(texts(split), key=lambda text: int(text.split()[1]))
        assert named(splits, split) == [label[text] for text in texts(split)]


def test_the_cut_depends_on_the_seed_alone(folder: Folder) -> None:
    file = uneven(folder)
    first, again, other = (texts(folder.splits(file, seed=seed).validation) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert len(first) == len(other)


def test_a_class_of_one_row_cannot_be_cut(folder: Folder) -> None:
    message = folder.refusal(folder.labels(["a", "b", "a"]))
    assert message.startswith("data: 1.jsonl has one row of a label (row 2), so it can't be in train and in validation")
    assert "data.files.validation" in message
    assert len(folder.splits(folder.labels(["a", "b"]), folder.labels(["b"])).train) == 2


def test_no_rows_are_cut_where_a_validation_file_is_given(folder: Folder) -> None:
    splits = folder.splits(folder.labels(["a", "b", "a"]), folder.labels(["b"]), validation_fraction=0.5)
    assert (len(splits.train), len(splits.validation)) == (3, 1)


def test_a_split_that_is_not_there_is_refused_by_name(folder: Folder) -> None:
    splits = folder.splits(folder.labels(["a", "b"]), folder.labels(["b"]))
    assert splits.get("validation") is splits.validation
    with pytest.raises(DataError, match=r"split 'test' is not there; this job has train, validation$"):
        splits.get("test")


ROWS = [
    {"text": "one", "label": "a"},
    {"text": "zwei, drei", "label": "b"},
    {"text": "NA", "label": "a"},
    {"text": "007", "label": "b"},
]


def test_equal_rows_have_equal_fingerprints_whatever_file_they_come_from(folder: Folder) -> None:
    prints = {
        folder.splits(folder.rows(ROWS, kind), folder.rows(ROWS[:2], kind)).fingerprint() for kind in ("csv", "jsonl")
    }
    assert len(prints) == 1


def test_the_fingerprint_sees_one_changed_letter_label_row_or_name(folder: Folder) -> None:
    validation = folder.rows(ROWS)
    changed = {
        "nothing": ROWS,
        "a letter": [{"text": "One", "label": "a"}, *ROWS[1:]],
        "a label": [{"text": "one", "label": "b"}, *ROWS[1:]],
        "the order": [ROWS[1], ROWS[0], *ROWS[2:]],
        "a row less": ROWS[:-1],
        "words moved": [{"text": "onezwei", "label": "a"}, {"text": ", drei", "label": "b"}, *ROWS[2:]],
    }
    prints = {what: folder.splits(folder.rows(rows), validation).fingerprint() for what, rows in changed.items()}
    # The same texts with the same label ids, under another name.
    renamed = folder.rows([row | {"label": {"a": "aa"}.get(row["label"], row["label"])} for row in ROWS])
    prints["a label's name"] = folder.splits(renamed, renamed).fingerprint()
    assert len(set(prints.values())) == len(prints)
    assert folder.splits(folder.rows(ROWS), validation).fingerprint() == prints["nothing"]


def test_the_fingerprint_of_a_pair_sees_which_text_is_which(folder: Folder) -> None:
    pairs = [{"text": "a", "other": "b", "label": "x"}, {"text": "b", "other": "c", "label": "y"}]
    file = folder.rows(pairs)
    one, two = ({"text": "text", "text_pair": "other"}, {"text": "other", "text_pair": "text"})
    assert folder.splits(file, file, columns=one).fingerprint() != folder.splits(file, file, columns=two).fingerprint()
