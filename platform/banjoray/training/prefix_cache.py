"""What the frozen bottom of a model gives for every row, kept on disk: computed once for all epochs, runs and trials.

<storage>/cache/prefix/<key>/
    states.npy      (cells, width) float32, or bfloat16 as int16: rows one after the other, without padding
    prefix.json     what it is of and its digest; written last

A key is a digest of all that could change a number in it: the rows, the tokenizer and where it cuts, every weight of
the bottom, the config, the depth, the number format. An entry is complete or absent; of two that want the same at once
one waits for the other; a torn one is made again.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor

from banjoray.config.job import JobConfig, is_url
from banjoray.data.batches import padded, sorted_batches
from banjoray.data.tokens import Tokens
from banjoray.errors import ConfigError
from banjoray.models.blocks import find_blocks
from banjoray.models.packed import packed
from banjoray.models.prefix import Cut, config_digest, frozen_depth, silence, trimmed
from banjoray.tasks.task import varies
from banjoray.training.clock import Clock
from banjoray.training.interface import Rows
from banjoray.training.learned import digest
from banjoray.training.scoring import BF16_TOKENS, EVALUATION_TOKENS, to_tensors

FORMAT = 2
MANIFEST, STATES = "prefix.json", "states.npy"
# How fast states can be read back, and how fast the bottom computes them; decides only where the cache is worth it.
READ_BYTES_PER_S, CPU_FLOPS, GPU_FLOPS = 1e9, 1e11, 5e13


@dataclass(frozen=True)
class States:
    """The states of a split: row ``i`` is ``stream[offsets[i]:offsets[i + 1]]``, (tokens, width)."""

    stream: np.ndarray
    offsets: np.ndarray

    def padded(self, rows: np.ndarray, columns: int, device: torch.device) -> Tensor:
        """Of some rows, (rows, columns, width) fp32, or (rows, 1, width) where one is kept; what is padding is 0."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        columns = columns if len(self.stream) > len(self.offsets) - 1 else 1
        mask = np.arange(columns) < lengths[:, None]
        where = (self.offsets[rows][:, None] + np.arange(columns))[mask]
        cells = torch.from_numpy(self.stream[where])
        cells = cells.view(torch.bfloat16) if cells.dtype == torch.int16 else cells
        if mask.all():
            return cells.to(device, torch.float32).view(len(rows), columns, -1)
        whole = torch.zeros(len(rows), columns, cells.shape[1], device=device)
        whole[torch.from_numpy(mask).to(device)] = cells.to(device, torch.float32)
        return whole


@dataclass(frozen=True)
class Above:
    """A split of which a model sees the states from its cut on."""

    cut: Cut
    states: States

    def start(self, rows: np.ndarray, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Have the next forward pass start from the states of ``rows``; what is left of its inputs."""
        ids = inputs["input_ids"]
        self.cut.states = self.states.padded(rows, ids.shape[1], ids.device)
        return trimmed(inputs, self.cut.states.shape[1])


@dataclass(frozen=True)
class Decision:
    """Whether states are kept, and why; ``bytes`` that the train rows take, ``depth`` of the cut."""

    keep: bool
    reason: str
    depth: int
    bytes: int


@dataclass(frozen=True)
class Prefix:
    """Both splits of a run, from the cut on; ``origin``: computed or read."""

    train: Above
    validation: Above
    origin: str


def prefix_cache(job: JobConfig) -> Path:
    """Where states are kept: beside the runs, or in the home folder where the runs are behind a URL."""
    return Path("~/.cache/banjoray/prefix").expanduser() if is_url(job.storage) else Path(job.storage) / "cache/prefix"


def decide(job: JobConfig, model: Any, lengths: np.ndarray, bf16: bool, only_first: bool) -> Decision | None:
    """Whether keeping states pays, for train rows of those ``lengths``; None where the bottom is not frozen.

    ``only_first``: the top block gives one position per row. Compares the time that reading states takes with the time
    that computing them again would, over all epochs and trials.
    """
    depth = frozen_depth(model)
    if depth is None:
        return None
    blocks = find_blocks(model)
    stack = model.base_model.get_submodule(blocks.stack)
    width = model.config.hidden_size
    cells = len(lengths) if only_first and depth == blocks.depth else int(lengths.sum())
    size = cells * width * (2 if bf16 else 4)
    passes = job.train.epochs * (job.tune.points if job.tune else 1)
    weights = sum(parameter.numel() for block in list(stack)[:depth] for parameter in block.parameters())
    computing = 2.0 * weights * float(lengths.sum()) / (GPU_FLOPS if job.scale.gpus_per_worker else CPU_FLOPS)
    reading = size / READ_BYTES_PER_S

    def told(keep: bool, reason: str) -> Decision:
        return Decision(keep, reason, depth, size)

    if varies(job):
        return told(False, f"{job.task} gives the model a row in other ways than by its words alone")
    if job.cache.prefix == "never":
        return told(False, "cache.prefix is never")
    if job.cache.prefix == "always":
        return told(True, "cache.prefix is always")
    if depth == 0:
        return told(False, "below the cut is nothing but a lookup of words")
    if passes < 2:
        return told(False, "one pass over the rows reads nothing twice")
    if size > job.cache.budget_gib * 2**30:
        return told(False, f"{size / 2**30:.1f} GiB are over cache.budget_gib {job.cache.budget_gib:g}")
    if reading >= computing:
        return told(False, f"reading {size / 2**20:.0f} MiB takes as long as computing them")
    return told(True, f"{passes} passes over {size / 2**20:.0f} MiB")


def kept_prefix(job: JobConfig, model: Any, rows: Rows, bf16: bool, notes: list[str], clock: Clock) -> Prefix | None:
    """The states of a run's rows, read or made now, and the model starting from them; None where they don't pay.

    Frozen bottoms lose their dropout in any case. The train rows' states are in bf16 where the run trains in bf16; the
    validation rows' are always fp32, as evaluation is, and their time is evaluation's. Raises ConfigError: cache.prefix
    always, and there is no room.
    """
    depth = frozen_depth(model)
    if depth is None:
        return None
    silence(model, depth)
    device = torch.device("cuda", torch.cuda.current_device()) if job.scale.gpus_per_worker else torch.device("cpu")
    cut = Cut(model.to(device), depth)
    narrow = cut.gives_first_only()
    decision = decide(job, model, rows.train.lengths, bf16, narrow)
    if decision is None or not decision.keep or not rows.train.digest:
        return None
    if not cut.agrees():
        if job.cache.prefix == "always":
            raise ConfigError(f"cache.prefix: found always, but {type(model).__name__} can't start above block {depth}")
        return None
    began = time.perf_counter()
    try:
        with clock("prefix"):
            shelf = _Shelf(job, model, cut, narrow, rows.pad_id)
            found = [shelf.states(rows.train, bf16)]
        with clock("evaluate"):
            found.append(shelf.states(rows.validation, False))
    except OSError as error:
        if job.cache.prefix == "always":
            raise ConfigError(f"cache.prefix: found always, but {prefix_cache(job)} can't be used ({error})") from None
        notes.append(f"no states are kept: {prefix_cache(job)} can't be used ({error})")
        return None
    if None in found:
        return None
    train, validation = (Above(cut, states) for states in found if states)
    cut.start_above()
    size = sum(states.stream.nbytes for states in found if states) / 2**20
    origin = "computed" if shelf.made else "read"
    notes.append(f"the lowest {depth} blocks' states {origin}: {size:.0f} MiB in {time.perf_counter() - began:.1f} s")
    return Prefix(train, validation, origin)


class _Shelf:
    """The folder of entries, as one model of one run uses it."""

    def __init__(self, job: JobConfig, model: Any, cut: Cut, narrow: bool, pad_id: int) -> None:
        self._job, self._model, self._cut, self._narrow, self._pad_id = job, model, cut, narrow, pad_id
        self._folder = prefix_cache(job)
        self._parts = _digests(model, cut.depth)
        self.made = False

    def states(self, tokens: Tokens, bf16: bool) -> States | None:
        """The states of a split; None if there is no room for them."""
        offsets = np.arange(len(tokens) + 1) if self._narrow else np.asarray(tokens.offsets)
        entry = self._entry(tokens, bf16, self._cut.depth, self._narrow)
        self._folder.mkdir(parents=True, exist_ok=True)
        # One makes it; who comes second, in whatever process, waits and reads.
        with filelock.FileLock(self._folder / f".{entry.name}.lock"):
            stream = _whole(entry)
            if stream is None:
                if not self._room(int(offsets[-1]) * self._width * (2 if bf16 else 4)):
                    return None
                self._fill(entry, tokens, offsets, bf16)
                stream = _whole(entry)
                self.made = True
        return None if stream is None else States(stream, offsets)

    @property
    def _width(self) -> int:
        return int(self._model.config.hidden_size)

    def _entry(self, tokens: Tokens, bf16: bool, depth: int, narrow: bool) -> Path:
        facts = [FORMAT, tokens.digest, self._parts[: depth + 2], bf16, narrow]
        return self._folder / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def _room(self, needed: int) -> bool:
        """Make room for an entry, the one first that was read longest ago; whether there is enough."""
        budget = int(self._job.cache.budget_gib * 2**30)
        sizes = _sizes(self._folder)
        for entry in list(sizes):
            if needed <= budget and sum(sizes.values()) + needed > budget:
                # Who reads it keeps it: the file goes with its last reader.
                shutil.rmtree(entry, ignore_errors=True)
                del sizes[entry]
        enough = needed <= budget and needed < shutil.disk_usage(self._folder).free
        if not enough and self._job.cache.prefix == "always":
            raise ConfigError(
                f"cache.budget_gib: found {self._job.cache.budget_gib:g} with cache.prefix always; the states of one "
                f"split take {math.ceil(needed / 2**30 * 100) / 100:g} GiB, and {self._folder} has "
                f"{shutil.disk_usage(self._folder).free / 2**30:.1f} GiB free; raise it, or set cache.prefix=auto"
            )
        return enough

    def _fill(self, entry: Path, tokens: Tokens, offsets: np.ndarray, bf16: bool) -> None:
        """Compute an entry: beside, then renamed."""
        staging = self._folder / f".staging-{entry.name}"
        # Left by a process that was killed: its lock is ours now.
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            shape = (int(offsets[-1]), self._width)
            kind = np.int16 if bf16 else np.float32
            stream = np.lib.format.open_memmap(staging / STATES, mode="w+", dtype=kind, shape=shape)
            with (staging / STATES).open("r+b") as file:
                # A full disk is an error here; met later, in the mapped memory, it would kill the process.
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            for rows, states in self._computed(tokens, bf16):
                where = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
                stream[where] = states
            stream.flush()
            del stream
            manifest = {"depth": self._cut.depth, "shape": shape, "sha256": _sha256(staging / STATES)}
            (staging / MANIFEST).write_text(json.dumps(manifest))
            shutil.rmtree(entry, ignore_errors=True)
            staging.rename(entry)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _computed(self, tokens: Tokens, bf16: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row numbers, their cells one after the other) of every row, in batches of like lengths."""
        device = next(self._model.parameters()).device
        precision = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
        lower_states, mode = self._shallower(tokens, bf16), torch.inference_mode()
        with lower_states as lower, _evaluating(self._model), packed(self._model), mode, precision:
            most = (BF16_TOKENS if bf16 else EVALUATION_TOKENS)[device.type]
            for rows in sorted_batches(tokens.lengths, most):
                inputs = to_tensors(padded(tokens, rows, self._pad_id), device)
                inputs = lower.start(rows, inputs) if lower else inputs
                states = self._cut.below(inputs)
                cells = states.flatten(0, 1) if self._narrow else states[inputs["attention_mask"].bool()]
                cells = cells.to(torch.bfloat16 if bf16 else torch.float32).cpu()
                yield rows, (cells.view(torch.int16) if bf16 else cells).numpy()

    @contextmanager
    def _shallower(self, tokens: Tokens, bf16: bool) -> Iterator[Above | None]:
        """The deepest entry below this cut, for the block to start from: a deeper one needs only what is above it."""
        for depth in range(self._cut.depth - 1, 0, -1):
            stream = _whole(self._entry(tokens, bf16, depth, False))
            if stream is not None:
                lower = Cut(self._model, depth)
                lower.start_above()
                try:
                    yield Above(lower, States(stream, np.asarray(tokens.offsets)))
                finally:
                    lower.restore()
                return
        yield None


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _digests(model: Any, depth: int) -> list[str]:
    """Of the config, of the embeddings, and of each of the lowest blocks."""
    base = model.base_model
    blocks = find_blocks(model)
    parts: list[dict[str, Tensor]] = [{name: base.get_parameter(name) for name in blocks.embeddings}]
    parts += [dict(base.get_submodule(f"{blocks.stack}.{number}").named_parameters()) for number in range(depth)]
    weights = [digest({name: part.detach().cpu() for name, part in named.items()}) for named in parts]
    return [config_digest(model.config), *weights]


def _whole(entry: Path) -> np.ndarray | None:
    """The states of an entry, memory-mapped; None where it is missing or torn."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text())
        if _sha256(entry / STATES) != manifest["sha256"]:
            return None
        stream: np.ndarray = np.load(entry / STATES, mmap_mode="r")
        # So that `_room` knows when it was last of use.
        (entry / MANIFEST).touch()
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return stream


def _sizes(folder: Path) -> dict[Path, int]:
    """Entries and their bytes, the one first that was read longest ago; another process may delete some meanwhile."""
    found: list[tuple[float, Path, int]] = []
    for entry in folder.glob("[!.]*"):
        with suppress(FileNotFoundError):
            parts = [path.stat() for path in entry.iterdir()]
            used = max((part.st_mtime for part in parts), default=0.0)
            found.append((used, entry, sum(part.st_size for part in parts)))
    return {entry: size for _, entry, size in sorted(found)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
