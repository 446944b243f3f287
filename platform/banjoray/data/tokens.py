"""Token ids of a split: made once, kept on disk by content, memory-mapped by every worker and run.

A cache entry is a folder of flat arrays. Features are slices of one token stream, so nothing is padded on disk:

    input_ids.npy  (tokens,) int32      offsets.npy (features + 1,) int64
    token_type_ids.npy (tokens,) int8   where the tokenizer makes them
    targets.npy                         one per feature, or slices of one stream by target_offsets.npy
    rows.npy (features,) int64          which row each feature is of
    aside.NAME.npy (tokens,) int32      what reads answers, and is no input of a model
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from banjoray.config.data import DataConfig
from banjoray.config.job import JobConfig, is_url
from banjoray.data.splits import Split

FORMAT = 2
# What a target is where there is nothing to learn; torch's cross-entropy passes it by.
IGNORED = -100
_ASIDE = "aside."


def token_cache(job: JobConfig) -> Path:
    """Where tokens are kept: beside the runs, or in the home folder where the runs are behind a URL."""
    return Path("~/.cache/banjoray/tokens").expanduser() if is_url(job.storage) else Path(job.storage) / "cache/tokens"


@dataclass(frozen=True)
class Features:
    """Some rows as token ids. A feature is what a model sees at once; a row gives one, a long one several, in order.

    ``inputs`` maps a model input to its ids, a list per feature; ``rows`` says which row each is of, from 0.
    ``aside`` has a list per feature too, as long as its ids: what reads answers, and is no input. ``targets`` is what
    the model should find, a list per feature; None: the split knows, one per row. ``cut`` counts rows that were longer
    than there is room for. ``settings`` has what each feature's request asks of its answer; None: nobody asks.
    """

    inputs: Mapping[str, Sequence[Sequence[int] | np.ndarray]]
    rows: Sequence[int]
    aside: Mapping[str, Sequence[Sequence[int] | np.ndarray]] = field(default_factory=dict)
    targets: Sequence[Sequence[int]] | None = None
    cut: int = 0
    settings: Sequence[Hashable] | None = None

    def by_row(self) -> "list[list[Feature]]":
        """The features of every row, in their order."""
        found: list[list[Feature]] = [[] for _ in range(max(self.rows, default=-1) + 1)]
        for number, row in enumerate(self.rows):
            inputs = {name: ids[number] for name, ids in self.inputs.items()}
            aside = {name: cells[number] for name, cells in self.aside.items()}
            found[row].append(Feature(inputs, aside, self.settings[number] if self.settings else None))
        return found


@dataclass(frozen=True)
class Feature:
    """What a model sees at once: its ids by model input, and what stands aside of them, as long as its ids.

    ``settings`` is what its request asks of the answer; features of unlike settings can wait in one batch.
    """

    inputs: Mapping[str, Sequence[int] | np.ndarray] = field(repr=False)
    aside: Mapping[str, Sequence[int] | np.ndarray] = field(repr=False, default_factory=dict)
    settings: Hashable = None

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


class Encoder(Protocol):
    """Who knows how rows become features: a task."""

    name: str

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, data: DataConfig) -> Features:
        """Some rows, column by column, as features."""
        ...


@dataclass(frozen=True)
class Tokens:
    """The tokens of a split.

    ``streams`` maps a model input to its values for all features, one after the other, (tokens,); feature ``i`` is
    ``[offsets[i], offsets[i + 1])`` of each, and of each of ``aside``. ``targets`` has one entry per feature, or is
    sliced by ``target_offsets`` where that is given. ``rows`` says which row each feature is of; None: each its own.
    ``cut`` counts rows that were longer than ``max_length``. ``digest`` names the rows, the tokenizer and where it
    cuts; empty where nobody asked.
    """

    streams: Mapping[str, np.ndarray]
    offsets: np.ndarray
    targets: np.ndarray
    cut: int = 0
    digest: str = ""
    target_offsets: np.ndarray | None = None
    aside: Mapping[str, np.ndarray] = field(default_factory=dict)
    rows: np.ndarray | None = None
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", np.diff(self.offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def target(self, feature: int) -> np.ndarray:
        """What feature ``feature`` has to find, unpadded."""
        if self.target_offsets is None:
            return np.asarray(self.targets[feature])
        return np.asarray(self.targets[self.target_offsets[feature] : self.target_offsets[feature + 1]])

    def feature(self, number: int) -> Feature:
        """One feature by itself."""
        part = slice(self.offsets[number], self.offsets[number + 1])
        inputs = {name: np.asarray(stream[part]) for name, stream in self.streams.items()}
        return Feature(inputs, {name: stream[part] for name, stream in self.aside.items()})


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of everything that decides how the tokenizer cuts text and writes conversations."""
    described: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "inputs": tokenizer.model_input_names,
        "cut": tokenizer.truncation_side,
        "chat": getattr(tokenizer, "chat_template", None),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described["backend"] = sorted(tokenizer.get_vocab().items())
    else:
        # Every call leaves its own truncation and padding behind in there.
        kept = json.loads(backend.to_str())
        described["backend"] = {key: value for key, value in kept.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def encode_texts(rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> Features:
    """Texts, or pairs of texts, as one feature each, cut to ``max_length`` (the longer text of a pair first)."""
    # Cut here rather than by the tokenizer's own default, so that longer rows can be counted.
    encoded = tokenizer(
        rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length, return_overflowing_tokens=False
    )
    cut = sum(bool(part.overflowing) for part in (encoded.encodings or ()))
    return Features(inputs_of(encoded), range(len(encoded["input_ids"])), cut=cut)


def inputs_of(encoded: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """What of a tokenizer's result a model takes; the mask comes with the padding."""
    return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}


def tokens_of(pieces: Sequence[Features], targets: np.ndarray | None = None) -> Tokens:
    """Features as arrays; ``pieces`` follow each other. ``targets`` are the split's own, one per row."""
    starts = np.cumsum([0, *(max(piece.rows, default=-1) + 1 for piece in pieces[:-1])])
    rows = np.concatenate(
        [np.asarray(piece.rows, np.int64) + start for piece, start in zip(pieces, starts, strict=True)]
    )
    lengths = np.fromiter((len(ids) for piece in pieces for ids in piece.inputs["input_ids"]), dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    streams = {
        name: _flat([piece.inputs[name] for piece in pieces], np.int8 if name == "token_type_ids" else np.int32)
        for name in pieces[0].inputs
    }
    aside = {name: _flat([piece.aside[name] for piece in pieces], np.int32) for name in pieces[0].aside}
    target_offsets = None
    own = [piece.targets for piece in pieces if piece.targets is not None]
    if own:
        sizes = np.fromiter((len(found) for piece in own for found in piece), dtype=np.int64)
        target_offsets = np.concatenate([[0], np.cumsum(sizes)])
        targets = _flat(own, np.int64)
    elif targets is None:
        targets = np.zeros(len(rows), dtype=np.int64)
    else:
        targets = targets[rows]
    cut = sum(piece.cut for piece in pieces)
    return Tokens(streams, offsets, targets, cut, target_offsets=target_offsets, aside=aside, rows=rows)


def _flat(pieces: Sequence[Sequence[Sequence[int] | np.ndarray]], kind: type[np.signedinteger[Any]]) -> np.ndarray:
    return np.fromiter((number for piece in pieces for ids in piece for number in ids), dtype=kind)


def tokenise(split: Split, task: Encoder, tokenizer: Any, data: DataConfig) -> Tokens:
    """The tokens of every row, as the task cuts them."""
    return tokens_of([task.encode(batch, tokenizer, data) for batch in split.batches(1000)], split.targets)


def cached_tokens(split: Split, task: Encoder, tokenizer: Any, data: DataConfig, cache: Path) -> Tokens:
    """`tokenise`, read from ``cache`` where an equal split was tokenised equally before.

    An entry is complete or absent; two processes that make the same one at once both succeed.
    """
    facts = {"format": FORMAT, "rows": split.fingerprint(), "tokenizer": tokenizer_digest(tokenizer), "task": task.name}
    facts |= {"cut": data.cutting()}
    entry = cache / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    there = entry.is_dir()
    found = _load(entry)
    if found is not None:
        return found
    if there:
        # Part of an entry, after a power cut or a cleaner of old files: out of the way, in one step.
        aside = Path(tempfile.mkdtemp(prefix=".staging-", dir=cache))
        with suppress(OSError):
            entry.rename(aside)
        shutil.rmtree(aside)
    made = tokenise(split, task, tokenizer, data)
    _store(made, entry)
    return _load(entry) or replace(made, digest=entry.name)


def _load(entry: Path) -> Tokens | None:
    """The tokens of an entry; None where a part is missing or cut off."""
    try:
        described = json.loads((entry / "tokens.json").read_text())
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in described["arrays"]}
    except (OSError, ValueError, EOFError):
        return None
    return Tokens(
        {name: array for name, array in arrays.items() if name in described["inputs"]},
        arrays["offsets"],
        arrays["targets"],
        described["cut"],
        entry.name,
        arrays.get("target_offsets"),
        {name.removeprefix(_ASIDE): array for name, array in arrays.items() if name.startswith(_ASIDE)},
        arrays["rows"],
    )


def _store(tokens: Tokens, entry: Path) -> None:
    """Write beside, then rename: a reader never sees half an entry."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=entry.parent))
    rows = np.arange(len(tokens)) if tokens.rows is None else tokens.rows
    arrays = dict(tokens.streams) | {"offsets": tokens.offsets, "targets": tokens.targets, "rows": rows}
    arrays |= {f"{_ASIDE}{name}": array for name, array in tokens.aside.items()}
    if tokens.target_offsets is not None:
        arrays["target_offsets"] = tokens.target_offsets
    for name, array in arrays.items():
        np.save(staging / f"{name}.npy", array)
    described = {"arrays": sorted(arrays), "inputs": sorted(tokens.streams), "cut": tokens.cut}
    (staging / "tokens.json").write_text(json.dumps(described))
    try:
        staging.replace(entry)
    except OSError:
        # Somebody else was first: a folder with files in it can't be replaced, and theirs is equal.
        shutil.rmtree(staging)
        if not (entry / "tokens.json").is_file():
            raise
