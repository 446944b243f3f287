"""Rows whose texts have any number of labels, or a number, instead of one label."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from banjoray.config.data import DataConfig
from banjoray.config.job import JobConfig
from banjoray.data.bad_rows import BadCell, looked_at, short
from banjoray.data.sources import Source, left_out
from banjoray.data.splits import Split, Splits, cut_anywhere, given_labels, ids_of, texts_and_labels
from banjoray.errors import DataError

# Files of these have text in every cell.
_TABLES = (".csv", ".tsv")


def multi_label_splits(job: JobConfig, token: str | None = None) -> Splits:
    """The splits of a job whose rows are texts, or pairs, with a list of labels each; an empty one says none.

    ``targets`` (rows, labels) int8 are 1 where a row has a label. Labels are data.labels, else the data set's own, else
    those of train, sorted. Validation is cut off train where there is none: anywhere, for rows with several labels
    can't be shared out by one. Raises DataError as `sources.read` does, for fewer than two labels, and with file and
    row for: a cell that is no list, what is no label in one, a label that is not among the labels.
    """
    texts, sources = texts_and_labels(job, token)
    column, lists, targets = job.data.columns.label, {}, {}
    for name, source in sources.items():
        cure = f"; {source.name} can't hold lists: use jsonl or parquet" * source.name.endswith(_TABLES)
        look = partial(_list_of, cure=cure)
        lists[name], found = looked_at(((cell,) for cell in source.rows[column][:]), column, look)
        sources[name] = source.without(found)
    if job.data.labels is None and _declared(sources["train"], column) is None:
        kind = _usual_kind(lists["train"])
        lists["train"], found = looked_at(((cells,) for cells in lists["train"]), column, partial(_alike, kind=kind))
        sources["train"] = sources["train"].without(found)
    labels = _label_names(sources["train"], lists["train"], job.data)
    for name, source in sources.items():
        ids = ids_of(labels, _declared(source, column))
        hot = partial(_many_hot, ids=ids, labels=labels, given=job.data.labels is not None)
        rows, found = looked_at(((cells,) for cells in lists[name]), column, hot)
        sources[name] = source.without(found)
        targets[name] = np.stack(rows)
    return _splits(job, texts, sources, targets, labels)


def number_splits(job: JobConfig, token: str | None = None) -> Splits:
    """The splits of a job whose rows are texts, or pairs, with a number each; ``targets`` (rows,) are float64.

    Raises DataError as `sources.read` does, and with file and row for a cell that is no finite number.
    """
    texts, sources = texts_and_labels(job, token)
    column, targets = job.data.columns.label, {}
    for name, source in sources.items():
        look = partial(_number, written=source.name.endswith(_TABLES))
        numbers, found = looked_at(((cell,) for cell in source.rows[column][:]), column, look)
        sources[name] = source.without(found)
        targets[name] = np.array(numbers, dtype=np.float64)
    return _splits(job, texts, sources, targets, ())


def _splits(
    job: JobConfig,
    texts: Mapping[str, str],
    sources: Mapping[str, Source],
    targets: Mapping[str, np.ndarray],
    labels: tuple[str, ...],
) -> Splits:
    splits = {
        name: Split(name, source.rows, texts, targets[name], numbers=source.numbers) for name, source in sources.items()
    }
    if "validation" not in splits:
        splits |= cut_anywhere(splits["train"], job.data.validation_fraction, job.train.seed, sources["train"].name)
    return Splits(splits["train"], splits["validation"], splits.get("test"), labels, left_out(sources))


def _list_of(cell: object, cure: str) -> list[str | int]:
    """The labels of a row, names without blanks around them, or numbers; raises BadCell."""
    if not isinstance(cell, list):
        raise BadCell("no list of labels", f" holds {short(cell)}; needed a list of labels, [] for none{cure}")
    for label in cell:
        if isinstance(label, bool) or not isinstance(label, str | int) or str(label).strip() == "":
            told = f" holds {short(label)} in its list; needed labels' names, or whole numbers"
            raise BadCell("no list of labels", told)
    return [label.strip() if isinstance(label, str) else label for label in cell]


def _usual_kind(lists: Sequence[Sequence[str | int]]) -> type:
    """What most labels are, names or numbers."""
    counted = Counter(type(label) for labels in lists for label in labels)
    return max(counted, key=counted.__getitem__, default=str)


def _alike(cells: list[str | int], kind: type) -> list[str | int]:
    """The labels of a row, all of a kind; raises BadCell."""
    for cell in cells:
        if type(cell) is not kind:
            told = (
                f" holds {short(cell)} in its list; needed labels' names, or whole numbers, the same kind in every row"
            )
            raise BadCell("label of another kind", told)
    return cells


def _label_names(train: Source, lists: Sequence[Sequence[str | int]], data: DataConfig) -> tuple[str, ...]:
    """The label names in the order of their ids."""
    if (given := given_labels(data)) is not None:
        return given
    seen: set[Any] = {label for labels in lists for label in labels}
    names = _declared(train, data.columns.label) or tuple(str(label) for label in sorted(seen))
    if len(names) < 2:
        found = f"one label ('{names[0]}')" if names else "no label"
        raise DataError(f"data: {train.name} shows {found}; needed at least two")
    return names


def _declared(source: Source, column: str) -> tuple[str, ...] | None:
    """The names that the data set itself gives to the numbers in its lists."""
    from datasets import ClassLabel

    inner = getattr(source.rows.features[column], "feature", None)
    return tuple(inner.names) if isinstance(inner, ClassLabel) else None


def _many_hot(
    cells: Sequence[str | int], ids: Mapping[str | int, int], labels: tuple[str, ...], given: bool
) -> np.ndarray:
    """(labels,) int8: 1 where a row has a label; raises BadCell. ``given``: the job says which labels there are."""
    found = np.zeros(len(labels), dtype=np.int8)
    for cell in cells:
        number = ids.get(cell)
        if number is None:
            known = "data.labels does not list" if given else "train never shows"
            told = f" holds label {short(cell)}, which {known}; known are {', '.join(labels)}"
            raise BadCell("unknown label", told)
        found[number] = 1
    return found


def _number(cell: object, written: bool) -> float:
    """A cell as a number; raises BadCell. ``written``: one cell of text makes text of all others in its column."""
    number = math.nan
    if isinstance(cell, int | float | str) and not isinstance(cell, bool) and (written or not isinstance(cell, str)):
        # OverflowError: a whole number of hundreds of digits.
        with suppress(ValueError, OverflowError):
            number = float(cell)
    if not math.isfinite(number):
        raise BadCell("no number", f" holds {short(cell)}; needed a finite number")
    return number
