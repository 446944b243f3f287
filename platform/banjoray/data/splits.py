"""Rows ready for a task: three splits with one set of label names, every label checked."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from banjoray.config.data import DataConfig
from banjoray.config.job import JobConfig
from banjoray.data.bad_rows import Finding, LeftOut, short
from banjoray.data.sources import SPLITS, Source, check_text, column_of, left_out, read
from banjoray.errors import DataError

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Split:
    """Rows in the order of their source.

    ``columns`` maps what a task calls a column (text, question, ...) to its name in ``rows``; ``added`` holds columns
    that are not in there. ``targets`` has what each row should be answered with, (rows, ...), where that is a number.
    ``numbers``, (rows,), has the place of every row in its source, from 0; None where it is that in ``rows``.
    """

    name: str
    rows: "datasets.Dataset"
    columns: Mapping[str, str]
    targets: np.ndarray | None = None
    added: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    numbers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[dict[str, Sequence[Any]]]:
        """Consecutive rows, column by column, as the task calls them: {"text": [...], "text_pair": [...]}."""
        rows = self.rows.select_columns(list(dict.fromkeys(self.columns.values())))
        for start in range(0, len(rows), size):
            cells = rows[start : start + size]
            read = {key: cells[column] for key, column in self.columns.items()}
            yield read | {key: cells[start : start + size] for key, cells in self.added.items()}

    def taken(self, numbers: np.ndarray, name: str) -> "Split":
        """Some of the rows, as a split of another name."""
        return replace(
            self,
            name=name,
            rows=self.rows.select(numbers),
            targets=None if self.targets is None else self.targets[numbers],
            added={key: [cells[number] for number in numbers] for key, cells in self.added.items()},
            numbers=numbers if self.numbers is None else self.numbers[numbers],
        )

    def fingerprint(self) -> str:
        """sha256 over every cell and target in order; equal for equal rows, wherever they were read from."""
        digest = hashlib.sha256()
        for batch in self.batches(4096):
            digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
        if self.targets is not None:
            # Bytes alone would not tell one label from a list of them.
            digest.update(f"{self.targets.dtype.kind}{self.targets.shape}".encode())
            digest.update(self.targets.astype(self.targets.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Splits:
    """What a run learns from, is steered by, and is finally scored on; ``test`` may be missing.

    ``left_out`` are the rows that stand in no split since they can't be used (data.skip_bad_rows).
    """

    train: Split
    validation: Split
    test: Split | None
    labels: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()

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


def plain_splits(
    job: JobConfig,
    columns: Sequence[str],
    texts: Sequence[str],
    token: str | None = None,
    findings: Callable[[Source], Iterable[Finding]] | None = None,
) -> Splits:
    """The splits of a job whose rows have no label; ``columns`` and ``texts`` are keys of data.columns.

    Every cell of ``texts`` is text; those of ``columns`` are there, and ``findings``, which is given every source
    whole, says what is wrong with them. The validation rows are cut off train where the source has none. Raises
    DataError as `sources.read` does, and for a bad row.
    """
    named = named_columns(job.data, (*columns, *texts))
    sources = read(job.data, job.hub, named, token)
    for name, source in sources.items():
        for key in texts:
            source = check_text(source, named[key])
        sources[name] = source.without(findings(source)) if findings else source
    splits = {name: Split(name, source.rows, named, numbers=source.numbers) for name, source in sources.items()}
    if "validation" not in splits:
        splits |= cut_anywhere(splits["train"], job.data.validation_fraction, job.train.seed, sources["train"].name)
    return Splits(splits["train"], splits["validation"], splits.get("test"), (), left_out(sources))


def named_columns(data: DataConfig, keys: Sequence[str]) -> dict[str, str]:
    """Keys of data.columns -> names in the data; of those that are not null."""
    found = {key: getattr(data.columns, key) for key in keys}
    return {key: name for key, name in found.items() if name is not None}


def texts_and_labels(job: JobConfig, token: str | None = None) -> tuple[dict[str, str], dict[str, Source]]:
    """The names of a job's text columns, and its sources with a label column, their texts checked."""
    texts = named_columns(job.data, ("text", "text_pair"))
    sources = read(job.data, job.hub, texts | {"label": job.data.columns.label}, token)
    for name, source in sources.items():
        for column in texts.values():
            source = check_text(source, column)
        sources[name] = source
    return texts, sources


def labelled_splits(job: JobConfig, token: str | None = None) -> Splits:
    """The splits of a job whose rows are texts, or pairs, with a label; validation cut off train where there is none.

    Raises DataError as `sources.read` does, and for: fewer than two labels, a missing label, a label in
    validation or test that train never shows, classes too small for a stratified cut.
    """
    texts, sources = texts_and_labels(job, token)
    sources["train"] = sources["train"].without(_of_other_kinds(sources["train"], job.data))
    labels = _label_names(sources["train"], job.data)
    targets: dict[str, np.ndarray] = {}
    seen = np.array([], dtype=int)
    for name in sorted(sources, key=SPLITS.index):
        found = _label_ids(sources[name], job.data, labels)
        sources[name] = sources[name].without(_unlabelled(sources[name], found, job.data, labels))
        targets[name] = found[found >= 0]
        if name == "train":
            seen = np.unique(targets[name])
        strange = ~np.isin(targets[name], seen)
        sources[name] = sources[name].without(_never_shown(targets[name], strange, seen, labels))
        targets[name] = targets[name][~strange]
    if len(seen) < 2:
        shown = f"one ('{labels[seen[0]]}')" if len(seen) else "none"
        raise DataError(f"data: {sources['train'].name} shows {shown} label; needed at least two")
    splits = {
        name: Split(name, source.rows, texts, targets[name], numbers=source.numbers) for name, source in sources.items()
    }
    if "validation" not in splits:
        splits |= _cut(splits["train"], job.data.validation_fraction, job.train.seed, sources["train"])
    return Splits(splits["train"], splits["validation"], splits.get("test"), labels, left_out(sources))


def _of_other_kinds(train: Source, data: DataConfig) -> list[Finding]:
    """Rows whose label is of another kind than most are, or no name and no whole number; none where names are given."""
    column = data.columns.label
    if data.labels is not None or _declared(train, column) is not None:
        return []
    cells, codes = _coded(train, column)
    counted: Counter[type] = Counter()
    for cell, count in zip(cells, np.bincount(codes, minlength=len(cells)).tolist(), strict=True):
        counted[type(cell)] += count if isinstance(cell, str | int) else 0
    kind = max(counted, key=counted.__getitem__, default=str)
    bad = [cell is not None and (type(cell) is not kind or not isinstance(cell, str | int)) for cell in cells]
    needed = "needed a label's name, or a whole number, the same kind in every row"
    return [
        Finding(row, "label of another kind", f" holds {short(cells[codes[row]])}; {needed}", column)
        for row in np.flatnonzero(np.array(bad, dtype=bool)[codes]).tolist()
    ]


def _coded(source: Source, column: str) -> tuple[list[Any], np.ndarray]:
    """The cells of a column that differ, and which of them each row has."""
    cells = column_of(source.rows, column)
    plain = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_boolean,
        pa.types.is_floating,
    )
    if not any(is_kind(cells.type) for is_kind in plain):
        found = source.rows[column][:]
        return found, np.arange(len(found))
    coded = pc.dictionary_encode(cells.combine_chunks(), null_encoding="encode")
    # One missing number makes all of a column numbers with a point.
    found = [
        int(cell) if isinstance(cell, float) and cell.is_integer() else cell for cell in coded.dictionary.to_pylist()
    ]
    return found, coded.indices.to_numpy()


def _label_names(train: Source, data: DataConfig) -> tuple[str, ...]:
    """The label names in the order of their ids: the job's, else the data set's, else sorted."""
    named = given_labels(data) or _declared(train, data.columns.label)
    if named is not None:
        return named
    cells, _ = _coded(train, data.columns.label)
    names = {cell.strip() if isinstance(cell, str) else cell for cell in cells}
    return tuple(str(name) for name in sorted(names - {None, ""}))


def given_labels(data: DataConfig) -> tuple[str, ...] | None:
    """The label names that the job gives; None if it leaves them to the data. Raises DataError: a name twice."""
    if data.labels is not None and len(set(data.labels)) != len(data.labels):
        raise DataError(f"data.labels: a name stands twice in {data.labels}")
    return None if data.labels is None else tuple(data.labels)


def _declared(source: Source, column: str) -> tuple[str, ...] | None:
    """The label names that the data set itself gives to its numbers."""
    from datasets import ClassLabel

    feature = source.rows.features[column]
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def _label_ids(source: Source, data: DataConfig, labels: tuple[str, ...]) -> np.ndarray:
    """The label id of every row, -1 where it has none; a number counts as an id where it is no label's name."""
    cells, codes = _coded(source, data.columns.label)
    ids = ids_of(labels, _declared(source, data.columns.label))
    found = [
        ids.get(cell.strip() if isinstance(cell, str) else cell, -1) if isinstance(cell, str | int) else -1
        for cell in cells
    ]
    known: np.ndarray = np.array(found, dtype=np.int64)
    return known.take(codes)


def ids_of(labels: Sequence[str], declared: Sequence[str] | None) -> dict[str | int, int]:
    """A label's name, or the number that stands for it, -> its id.

    ``declared`` are the names that a data set gives to its numbers. Where it gives none, a number is a label's name, or
    if no label is called by a number, an id.
    """
    ids: dict[str | int, int] = {name: number for number, name in enumerate(labels)}
    if declared is not None:
        # Not the number itself: data.labels, or train, may have the same names in another order.
        return ids | {number: ids[name] for number, name in enumerate(declared) if name in ids}
    whole: dict[str | int, int] = {int(name): number for number, name in enumerate(labels) if _is_whole(name)}
    return ids | (whole or {number: number for number in range(len(labels))})


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _unlabelled(source: Source, ids: np.ndarray, data: DataConfig, labels: tuple[str, ...]) -> Iterator[Finding]:
    """Rows without an id, and why."""
    column = data.columns.label
    cells, codes = _coded(source, column)
    for row in np.flatnonzero(ids < 0).tolist():
        cell = cells[codes[row]]
        if cell is None or cell == -1 or str(cell).strip() == "":
            yield Finding(row, "no label", f" holds no label ({cell!r}); needed one of {', '.join(labels)}", column)
            continue
        why = "which data.labels does not list; it lists" if data.labels else "which train never shows; it shows"
        yield Finding(row, "unknown label", f" holds label {short(cell)}, {why} {', '.join(labels)}", column)


def _never_shown(
    targets: np.ndarray, strange: np.ndarray, seen: np.ndarray, labels: tuple[str, ...]
) -> Iterator[Finding]:
    shown = ", ".join(labels[number] for number in seen)
    for row in np.flatnonzero(strange).tolist():
        told = f" holds label '{labels[targets[row]]}', which train never shows; it shows {shown}"
        yield Finding(row, "unknown label", told)


def _cut(train: Split, fraction: float, seed: int, source: Source) -> dict[str, Split]:
    """Train without, and validation with, a stratified share of the rows; both keep the source's order."""
    assert train.targets is not None
    generator = np.random.default_rng(seed)
    taken: list[np.ndarray] = []
    for label in np.unique(train.targets):
        members = np.flatnonzero(train.targets == label)
        if len(members) < 2:
            raise DataError(
                f"data: {source.name} has one row of a label (row {source.number(members[0])}), so it can't be in "
                "train and in validation; add rows, or give data.files.validation"
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        taken.append(generator.choice(members, size=count, replace=False))
    validation = np.sort(np.concatenate(taken))
    return _parted(train, validation)


def cut_anywhere(train: Split, fraction: float, seed: int, source: str) -> dict[str, Split]:
    """Train without, and validation with, a seeded share of the rows; both keep the source's order."""
    if len(train) < 2:
        raise DataError(f"data: {source} has one row; needed one for train and one for validation")
    count = min(max(1, round(fraction * len(train))), len(train) - 1)
    return _parted(train, np.sort(np.random.default_rng(seed).choice(len(train), size=count, replace=False)))


def _parted(train: Split, validation: np.ndarray) -> dict[str, Split]:
    rest = np.setdiff1d(np.arange(len(train)), validation)
    return {"train": train.taken(rest, "train"), "validation": train.taken(validation, "validation")}
