"""What a data set holds, looked at before training: labels, lengths, rows that repeat, contradict or leak."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from banjoray.config.data import DataConfig
from banjoray.data.bad_rows import LeftOut
from banjoray.data.splits import Split, Splits
from banjoray.data.tokens import Encoder, tokenise

# Longer than any row: lengths are told as they are, not as they are cut.
UNCUT = 2**30
BINS = 20
# Rows that are named of every finding.
NAMED = 5


@dataclass(frozen=True)
class Lengths:
    """Tokens per row, special ones included, before anything is cut.

    ``counts[i]`` rows are ``edges[i]`` to ``edges[i + 1]`` tokens long; ``over`` are longer than data.max_length.
    """

    shortest: int
    median: float
    p95: float
    longest: int
    over: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Numbers:
    """The numbers that the rows of a split are to be answered with."""

    lowest: float
    median: float
    mean: float
    highest: float


@dataclass(frozen=True)
class Found:
    """Rows that have something in common: how many there are, and the first few's numbers in their file, from 1."""

    rows: int
    first: tuple[int, ...]


@dataclass(frozen=True)
class SplitProfile:
    """What one split holds.

    ``labels`` counts how often each label is to be found, ``labelled`` in how many rows (or words) one is looked for;
    ``numbers`` describes what rows have instead of labels. ``repeated`` are rows whose text stood in an earlier row,
    with the same label or without one; ``contradicting`` those whose text has another label in another row.
    """

    name: str
    rows: int
    labels: Mapping[str, int]
    labelled: int
    numbers: Numbers | None
    lengths: Lengths
    repeated: Found
    contradicting: Found


@dataclass(frozen=True)
class Overlap:
    """How many rows of ``second`` have a text that stands in ``first`` too."""

    first: str
    second: str
    found: Found


@dataclass(frozen=True)
class Profile:
    """A job's data: each split, what they share, where rows are cut (tokens), and which rows stand in no split."""

    splits: tuple[SplitProfile, ...]
    overlaps: tuple[Overlap, ...]
    max_length: int
    left_out: tuple[LeftOut, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self) | {"left_out": [source.to_json() for source in self.left_out]}


def profile(splits: Splits, task: Encoder, tokenizer: Any, data: DataConfig) -> Profile:
    """The profile of a job's splits; ``data`` are the job's settings (a DataConfig)."""
    uncut = data.model_copy(update={"max_length": UNCUT})
    there = [split for split in (splits.train, splits.validation, splits.test) if split is not None]
    keys = {split.name: _keys(split) for split in there}
    told, most = [], 1
    measured = []
    for split in there:
        tokens = tokenise(split, task, tokenizer, uncut)
        lengths = np.bincount(tokens.rows, tokens.lengths).astype(int) if tokens.rows is not None else tokens.lengths
        measured.append((split, tokens, lengths))
        most = max(most, int(lengths.max()))
    edges = np.unique(np.linspace(0, most, BINS + 1).round().astype(int))
    for split, tokens, lengths in measured:
        targets = np.asarray(tokens.targets)
        told.append(
            SplitProfile(
                split.name,
                len(split),
                _counted(targets, splits.labels),
                int((targets >= 0).sum()) if targets.ndim == 1 else len(targets),
                _numbers(targets),
                _lengths(lengths, edges, data.max_length),
                _repeated(keys[split.name], split),
                _contradicting(keys[split.name], split),
            )
        )
    overlaps = tuple(
        Overlap(
            first.name,
            second.name,
            _named(np.flatnonzero(np.isin(keys[second.name], keys[first.name])), second),
        )
        for first, second in combinations(there, 2)
    )
    return Profile(tuple(told), overlaps, data.max_length, splits.left_out)


def _keys(split: Split) -> np.ndarray:
    """A short digest of every row's text, (rows,): of all its columns, letters lowered, blanks joined."""
    found: list[bytes] = []
    for batch in split.batches(4096):
        cells = [batch[column] for column in split.columns]
        for row in zip(*cells, strict=True):
            plain = [" ".join(cell.lower().split()) if isinstance(cell, str) else cell for cell in row]
            text = json.dumps(plain, ensure_ascii=False, default=str)
            found.append(hashlib.blake2b(text.encode(), digest_size=12).digest())
    return np.array(found, dtype="S12")


def _counted(targets: np.ndarray, labels: Sequence[str]) -> dict[str, int]:
    if not labels:
        return {}
    several = targets.ndim > 1
    counts = targets.sum(axis=0) if several else np.bincount(targets[targets >= 0], minlength=len(labels))
    return {label: int(count) for label, count in zip(labels, counts, strict=True)}


def _numbers(targets: np.ndarray) -> Numbers | None:
    if not np.issubdtype(targets.dtype, np.floating):
        return None
    found = (targets.min(), np.median(targets), targets.mean(), targets.max())
    return Numbers(*map(float, found))


def _lengths(lengths: np.ndarray, edges: np.ndarray, max_length: int) -> Lengths:
    counts, _ = np.histogram(lengths, bins=edges)
    return Lengths(
        int(lengths.min()),
        float(np.median(lengths)),
        float(np.quantile(lengths, 0.95)),
        int(lengths.max()),
        int((lengths > max_length).sum()),
        tuple(map(int, edges)),
        tuple(map(int, counts)),
    )


def _repeated(keys: np.ndarray, split: Split) -> Found:
    seen: set[Any] = set()
    rows = []
    for number, key in enumerate(keys.tolist()):
        row = (key, _label(split.targets, number))
        if row in seen:
            rows.append(number)
        seen.add(row)
    return _named(np.array(rows, dtype=int), split)


def _contradicting(keys: np.ndarray, split: Split) -> Found:
    if split.targets is None:
        return Found(0, ())
    labels: dict[bytes, set[Any]] = {}
    for number, key in enumerate(keys.tolist()):
        labels.setdefault(key, set()).add(_label(split.targets, number))
    rows = [number for number, key in enumerate(keys.tolist()) if len(labels[key]) > 1]
    return _named(np.array(rows, dtype=int), split)


def _label(targets: np.ndarray | None, number: int) -> Any:
    if targets is None:
        return None
    found = targets[number].tolist()
    return tuple(found) if isinstance(found, list) else found


def _named(rows: np.ndarray, split: Split) -> Found:
    first = rows[:NAMED] if split.numbers is None else split.numbers[rows[:NAMED]]
    return Found(len(rows), tuple(int(row) + 1 for row in first))
