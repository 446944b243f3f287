"""Rows ready for a task: three splits with one set of label names, every label checked."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from banjoray.config.job import DataConfig, JobConfig
from banjoray.data.sources import Source, read
from banjoray.errors import DataError

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Split:
    """Rows with text and label id, in the order of their source.

    ``texts`` holds the text, or the two texts of a pair, as columns of ``rows``; ``targets`` the label ids, (rows,).
    """

    name: str
    rows: "datasets.Dataset"
    texts: tuple[str, ...]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[dict[str, list[str]]]:
        """Consecutive rows as {"text": [...]} and, for pairs, {"text_pair": [...]}."""
        keys = ("text", "text_pair")[: len(self.texts)]
        for start in range(0, len(self.rows), size):
            cells = self.rows[start : start + size]
            yield {key: cells[column] for key, column in zip(keys, self.texts, strict=True)}

    def fingerprint(self) -> str:
        """sha256 over every text and label id in order; equal for equal rows, wherever they were read from."""
        digest = hashlib.sha256()
        for batch in self.batches(4096):
            digest.update(json.dumps(batch, sort_keys=True).encode())
        digest.update(self.targets.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Splits:
    """What a run learns from, is steered by, and is finally scored on; ``test`` may be missing."""

    train: Split
    validation: Split
    test: Split | None
    labels: tuple[str, ...]

    def get(self, name: str) -> Split:
        """The split of that name; raises DataError if the job has none."""
        split: Split | None = {"train": self.train, "validation": self.validation, "test": self.test}.get(name)
        if split is None:
            raise DataError(f"split '{name}' is not there; this job has train, validation{', test' * bool(self.test)}")
        return split

    def fingerprint(self) -> str:
        """sha256 over the label names and every split."""
        parts = [json.dumps(self.labels)]
        parts += [split.fingerprint() for split in (self.train, self.validation, self.test) if split]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def load_splits(job: JobConfig, token: str | None = None) -> Splits:
    """The splits of a job, with the validation rows cut off train where the source has none.

    Raises DataError as `sources.read` does, and for: fewer than two labels, a missing label, a label in
    validation or test that train never shows, classes too small for a stratified cut.
    """
    sources = read(job.data, job.hub, token)
    labels = _label_names(sources["train"], job.data)
    targets = {name: _label_ids(source, job.data, labels) for name, source in sources.items()}
    seen = np.unique(targets["train"])
    for name in ("validation", "test"):
        if name in targets:
            _check_seen(sources[name], targets[name], seen, labels)
    if len(seen) < 2:
        found = f"one ('{labels[seen[0]]}')" if len(seen) else "none"
        raise DataError(f"data: {sources['train'].name} shows {found} label; needed at least two")
    texts = tuple(filter(None, (job.data.columns.text, job.data.columns.text_pair)))
    splits = {name: Split(name, source.rows, texts, targets[name]) for name, source in sources.items()}
    if "validation" not in splits:
        splits |= _cut(splits["train"], job.data.validation_fraction, job.train.seed, sources["train"].name)
    return Splits(splits["train"], splits["validation"], splits.get("test"), labels)


def _label_names(train: Source, data: DataConfig) -> tuple[str, ...]:
    """The label names in the order of their ids: the job's, else the data set's, else sorted."""
    if data.labels is not None:
        if len(set(data.labels)) != len(data.labels):
            raise DataError(f"data.labels: a name stands twice in {data.labels}")
        return tuple(data.labels)
    declared = _declared(train, data.columns.label)
    if declared is not None:
        return declared
    values = train.rows[data.columns.label][:]
    kind = next((type(value) for value in values if value is not None), str)
    for row, value in enumerate(values):
        if value is not None and (type(value) is not kind or not isinstance(value, (str, int))):
            raise DataError(
                f"data: {train.where(row)}, column '{data.columns.label}' holds {value!r}; "
                "needed a label's name, or a whole number, the same kind in every row"
            )
    names = {value.strip() if isinstance(value, str) else value for value in values}
    return tuple(str(name) for name in sorted(names - {None, ""}))


def _declared(source: Source, column: str) -> tuple[str, ...] | None:
    """The label names that the data set itself gives to its numbers."""
    from datasets import ClassLabel

    feature = source.rows.features[column]
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def _label_ids(source: Source, data: DataConfig, labels: tuple[str, ...]) -> np.ndarray:
    """The label id of every row; a number counts as an id where it is no label's name."""
    column = data.columns.label
    cells = source.rows[column][:]
    ids = {name: number for number, name in enumerate(labels)}
    declared = _declared(source, column)
    if declared is None:
        whole = {int(name): number for name, number in ids.items() if _is_whole(name)}
        numbered = whole or {number: number for number in range(len(labels))}
    else:
        # Not the number itself: data.labels, or train, may have the same names in another order.
        numbered = {number: ids[name] for number, name in enumerate(declared) if name in ids}
    found = np.empty(len(cells), dtype=np.int64)
    for row, cell in enumerate(cells):
        number = ids.get(cell.strip()) if isinstance(cell, str) else None
        if isinstance(cell, int):
            number = numbered.get(cell)
        if number is None:
            raise DataError(_bad_label(source, row, data, cell, labels))
        found[row] = number
    return found


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _bad_label(source: Source, row: int, data: DataConfig, cell: object, labels: tuple[str, ...]) -> str:
    where = f"data: {source.where(row)}, column '{data.columns.label}'"
    if cell is None or cell == -1 or str(cell).strip() == "":
        return f"{where} holds no label ({cell!r}); needed one of {', '.join(labels)}"
    if data.labels is not None:
        return f"{where} holds label {cell!r}, which data.labels does not list; it lists {', '.join(labels)}"
    return f"{where} holds label {cell!r}, which train never shows; it shows {', '.join(labels)}"


def _check_seen(source: Source, targets: np.ndarray, seen: np.ndarray, labels: tuple[str, ...]) -> None:
    strange = np.flatnonzero(~np.isin(targets, seen))
    if len(strange):
        shown = ", ".join(labels[number] for number in seen)
        raise DataError(
            f"data: {source.where(int(strange[0]))} holds label '{labels[targets[strange[0]]]}', "
            f"which train never shows; it shows {shown}"
        )


def _cut(train: Split, fraction: float, seed: int, source: str) -> dict[str, Split]:
    """Train without, and validation with, a stratified share of the rows; both keep the source's order."""
    generator = np.random.default_rng(seed)
    taken: list[np.ndarray] = []
    for label in np.unique(train.targets):
        members = np.flatnonzero(train.targets == label)
        if len(members) < 2:
            raise DataError(
                f"data: {source} has one row of a label (row {members[0] + 1}), so it can't be in train and in "
                "validation; add rows, or give data.files.validation"
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        taken.append(generator.choice(members, size=count, replace=False))
    validation = np.sort(np.concatenate(taken))
    rest = np.setdiff1d(np.arange(len(train)), validation)
    return {
        "train": Split("train", train.rows.select(rest), train.texts, train.targets[rest]),
        "validation": Split("validation", train.rows.select(validation), train.texts, train.targets[validation]),
    }
