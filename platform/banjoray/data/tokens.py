"""Token ids of a split: made once, kept on disk by content, memory-mapped by every worker and run.

A cache entry is a folder of flat arrays. Rows are slices of one token stream, so nothing is padded on disk:

    input_ids.npy  (tokens,) int32      offsets.npy (rows + 1,) int64      targets.npy (rows,) int64
    token_type_ids.npy (tokens,) int8   where the tokenizer makes them
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from banjoray.config.job import JobConfig, is_url
from banjoray.data.splits import Split

FORMAT = 1


def token_cache(job: JobConfig) -> Path:
    """Where tokens are kept: beside the runs, or in the home folder where the runs are behind a URL."""
    return Path("~/.cache/banjoray/tokens").expanduser() if is_url(job.storage) else Path(job.storage) / "cache/tokens"


@dataclass(frozen=True)
class Tokens:
    """The tokens of a split.

    ``streams`` maps a model input to its values for all rows, one after the other, (tokens,); row ``i`` is
    ``[offsets[i], offsets[i + 1])`` of each. ``targets`` has one entry per row. ``cut`` counts rows that were
    longer than ``max_length``. ``digest`` names the rows, the tokenizer and where it cuts; empty where nobody asked.
    """

    streams: Mapping[str, np.ndarray]
    offsets: np.ndarray
    targets: np.ndarray
    cut: int = 0
    digest: str = ""
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", np.diff(self.offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of everything that decides how the tokenizer cuts text."""
    described: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "inputs": tokenizer.model_input_names,
        "cut": tokenizer.truncation_side,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described["backend"] = sorted(tokenizer.get_vocab().items())
    else:
        # Every call leaves its own truncation and padding behind in there.
        kept = json.loads(backend.to_str())
        described["backend"] = {key: value for key, value in kept.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def tokenise(split: Split, tokenizer: Any, max_length: int) -> Tokens:
    """The tokens of every row, cut to ``max_length`` (the longer text of a pair first)."""
    pieces: list[Mapping[str, list[list[int]]]] = []
    cut = 0
    for batch in split.batches(1000):
        # Cut here rather than by the tokenizer's own default, so that longer rows can be counted.
        encoded = tokenizer(
            batch["text"],
            batch.get("text_pair"),
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=False,
        )
        cut += sum(bool(part.overflowing) for part in (encoded.encodings or ()))
        pieces.append(encoded)
    lengths = np.fromiter((len(ids) for piece in pieces for ids in piece["input_ids"]), dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    names = [name for name in ("input_ids", "token_type_ids") if name in pieces[0]]
    streams = {
        name: np.fromiter(
            (number for piece in pieces for row in piece[name] for number in row),
            dtype=np.int32 if name == "input_ids" else np.int8,
            count=int(offsets[-1]),
        )
        for name in names
    }
    return Tokens(streams, offsets, split.targets, cut)


def cached_tokens(split: Split, tokenizer: Any, max_length: int, cache: Path) -> Tokens:
    """`tokenise`, read from ``cache`` where an equal split was tokenised equally before.

    An entry is complete or absent; two processes that make the same one at once both succeed.
    """
    facts = {"format": FORMAT, "rows": split.fingerprint(), "tokenizer": tokenizer_digest(tokenizer), "max": max_length}
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
    made = tokenise(split, tokenizer, max_length)
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
        {name: array for name, array in arrays.items() if name not in ("offsets", "targets")},
        arrays["offsets"],
        arrays["targets"],
        described["cut"],
        entry.name,
    )


def _store(tokens: Tokens, entry: Path) -> None:
    """Write beside, then rename: a reader never sees half an entry."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=entry.parent))
    arrays = dict(tokens.streams) | {"offsets": tokens.offsets, "targets": tokens.targets}
    for name, array in arrays.items():
        np.save(staging / f"{name}.npy", array)
    (staging / "tokens.json").write_text(json.dumps({"arrays": sorted(arrays), "cut": tokens.cut}))
    try:
        staging.replace(entry)
    except OSError:
        # Somebody else was first: a folder with files in it can't be replaced, and theirs is equal.
        shutil.rmtree(staging)
        if not (entry / "tokens.json").is_file():
            raise
