"""Rows whose texts have any number of labels, or a number, instead of one label."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from banjoray.config.job import DataConfig, JobConfig
from banjoray.data.sources import Source, check_text, read
from banjoray.data.splits import Split, Splits, cut_anywhere, ids_of, named_columns
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
    sources = _sources(job, token)
    column = job.data.columns.label
    lists = {name: _lists(source, column) for name, source in sources.items()}
    labels = _label_names(sources["train"], lists["train"], job.data)
    targets = {name: _many_hot(source, lists[name], job.data, labels) for name, source in sources.items()}
    return _splits(job, sources, targets, labels)


def number_splits(job: JobConfig, token: str | None = None) -> Splits:
    """The splits of a job whose rows are texts, or pairs, with a number each; ``targets`` (rows,) are float64.

    Raises DataError as `sources.read` does, and with file and row for a cell that is no finite number.
    """
    sources = _sources(job, token)
    targets = {name: _numbers(source, job.data.columns.label) for name, source in sources.items()}
    return _splits(job, sources, targets, ())


def _sources(job: JobConfig, token: str | None) -> dict[str, Source]:
    """The sources of a job, their texts checked."""
    texts = named_columns(job.data, ("text", "text_pair"))
    sources = read(job.data, job.hub, texts | {"label": job.data.columns.label}, token)
    for source in sources.values():
        for column in texts.values():
            check_text(source, column)
    return sources


def _splits(
    job: JobConfig, sources: Mapping[str, Source], targets: Mapping[str, np.ndarray], labels: tuple[str, ...]
) -> Splits:
    texts = named_columns(job.data, ("text", "text_pair"))
    splits = {name: Split(name, source.rows, texts, targets[name]) for name, source in sources.items()}
    if "validation" not in splits:
        splits |= cut_anywhere(splits["train"], job.data.validation_fraction, job.train.seed, sources["train"].name)
    return Splits(splits["train"], splits["validation"], splits.get("test"), labels)


def _lists(source: Source, column: str) -> list[list[str | int]]:
    """The labels of every row, names without blanks around them, or numbers."""
    cells = source.rows[column][:]
    for row, cell in enumerate(cells):
        where = f"data: {source.where(row)}, column '{column}'"
        if not isinstance(cell, list):
            cure = f"; {source.name} can't hold lists: use jsonl or parquet" * source.name.endswith(_TABLES)
            raise DataError(f"{where} holds {cell!r}; needed a list of labels, [] for none{cure}")
        for label in cell:
            if isinstance(label, bool) or not isinstance(label, str | int) or str(label).strip() == "":
                raise DataError(f"{where} holds {label!r} in its list; needed labels' names, or whole numbers")
    return [[label.strip() if isinstance(label, str) else label for label in cell] for cell in cells]


def _label_names(train: Source, lists: Sequence[Sequence[str | int]], data: DataConfig) -> tuple[str, ...]:
    """The label names in the order of their ids."""
    if data.labels is not None:
        if len(set(data.labels)) != len(data.labels):
            raise DataError(f"data.labels: a name stands twice in {data.labels}")
        return tuple(data.labels)
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
    source: Source, lists: Sequence[Sequence[str | int]], data: DataConfig, labels: tuple[str, ...]
) -> np.ndarray:
    """(rows, labels) int8: 1 where a row has a label."""
    ids = ids_of(labels, _declared(source, data.columns.label))
    found = np.zeros((len(lists), len(labels)), dtype=np.int8)
    for row, cells in enumerate(lists):
        for cell in cells:
            number = ids.get(cell)
            if number is None:
                known = "data.labels does not list" if data.labels is not None else "train never shows"
                raise DataError(
                    f"data: {source.where(row)}, column '{data.columns.label}' holds label {cell!r}, which {known}; "
                    f"known are {', '.join(labels)}"
                )
            found[row, number] = 1
    return found


def _numbers(source: Source, column: str) -> np.ndarray:
    """The number of every row, (rows,) float64."""
    cells = source.rows[column][:]
    found = np.empty(len(cells), dtype=np.float64)
    for row, cell in enumerate(cells):
        number = _number(cell, written=source.name.endswith(_TABLES))
        if number is None:
            raise DataError(f"data: {source.where(row)}, column '{column}' holds {cell!r}; needed a finite number")
        found[row] = number
    return found


def _number(cell: object, written: bool) -> float | None:
    """A cell as a number; ``written``: one cell of text makes text of all others in its column."""
    if isinstance(cell, bool) or not isinstance(cell, int | float | str) or (isinstance(cell, str) and not written):
        return None
    try:
        number = float(cell)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
