"""What a job will take, before anything is taken: steps, memory, disk, trials. No worker, no Ray, no weights."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from banjoray.config.job import JobConfig, is_url
from banjoray.data.batches import batches_of, shares, width_of
from banjoray.data.tokens import Tokens, token_cache
from banjoray.errors import ModelError
from banjoray.models.blocks import find_blocks
from banjoray.models.readout import AFTER_ATTENTION
from banjoray.training.compatibility import AXES, check
from banjoray.training.interface import Rows
from banjoray.training.prefix_cache import decide
from banjoray.training.preflight import Ready, prepare
from banjoray.training.strategies import coarse
from banjoray.tuning.footprint import (
    GIB,
    Activations,
    Memory,
    Shape,
    activations,
    checkpoint_bytes,
    memory,
    precision,
    shaped,
)
from banjoray.tuning.space import STRUCTURAL, at_once, corner_jobs, search_of


@dataclass(frozen=True)
class Work:
    """What there is to compute; what is per epoch is that of the first.

    ``padding`` is the share of cells without a token; ``microbatch`` (rows, tokens) the largest of one forward pass.
    """

    train_rows: int
    validation_rows: int
    labels: int
    epochs: int
    steps_per_epoch: int
    steps: int
    tokens_per_epoch: int
    padding: float
    longest_row: int
    rows_cut: int
    microbatch: tuple[int, int]


@dataclass(frozen=True)
class Frozen:
    """What a choice of ``freeze`` leaves to train, and what becomes of the states of its frozen bottom.

    ``depth`` counts the blocks of the bottom; None where it is trained. ``keep`` is what a worker is expected to
    decide: it also tries the model out, which takes its weights. ``prefix_bytes`` are those of both splits, if kept.
    """

    freeze: Any
    chosen: bool
    trained: int
    checkpoint_bytes: int
    depth: int | None
    keep: bool
    reason: str
    prefix_bytes: int


@dataclass(frozen=True)
class Disk:
    """Bytes at the job's storage: ``run_bytes`` with the checkpoint being written; ``free_bytes`` None behind a URL."""

    checkpoint_bytes: int
    run_bytes: int
    tokens_bytes: int
    prefix_bytes: int
    free_bytes: int | None


@dataclass(frozen=True)
class Study:
    """A search on this machine; ``disk_bytes`` is the best and the last checkpoint of every trial."""

    trials: int
    at_once: int
    waves: int
    disk_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a job will take. ``weights`` are all, ``trained`` those that change: of the word table, the words in use.

    ``warnings`` are lines about the rows: what is left out, what is cut.
    """

    name: str
    work: Work
    weights: int
    trained: int
    workers: int
    precision: str
    activations: Activations
    memory: tuple[Memory, ...]
    freezes: tuple[Frozen, ...]
    disk: Disk
    study: Study | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        totals = [asdict(one) | {"total_gib": one.total_gib} for one in self.memory]
        kept = asdict(self.activations) | {"numbers": self.activations.numbers, "bytes": self.activations.bytes}
        return asdict(self) | {"memory": totals, "activations": kept}


def plan(job: JobConfig) -> Plan:
    """What a job will take.

    Raises ConfigError, DataError or ModelError where it could not run, or where a choice of its space could not.
    """
    ready, corners = checked(job)
    own = shaped(job, ready)
    others = _corner_shapes(corners)
    tried = {str(shape.job.freeze): shape for key, shape in (*others, ("freeze", own)) if key == "freeze"}
    freezes = tuple(_frozen(shape, shape is own) for shape in tried.values())
    work = work_of(job, ready.rows)
    kept = activations(own, work.microbatch)
    largest = max(checkpoint_bytes(shape) for shape in (own, *(shape for _, shape in others)))
    return Plan(
        name=job.name,
        work=work,
        weights=own.weights,
        trained=own.trained,
        workers=job.scale.least_workers,
        precision=precision(job),
        activations=kept,
        memory=tuple(memory(own, strategy, kept) for strategy in AXES["strategy"]),
        freezes=freezes,
        disk=_disk(own, freezes),
        study=_study(job, largest) if job.tune else None,
        warnings=ready.warnings,
    )


def checked(job: JobConfig) -> tuple[Ready, list[tuple[str, JobConfig]]]:
    """The job, found possible, and the jobs at the corners of its space, with the key; none where it has no space.

    Raises ConfigError, DataError or ModelError.
    """
    return prepare(job), list(corner_jobs(job)) if job.tune else []


def work_of(job: JobConfig, rows: Rows) -> Work:
    """What a job has to compute, its batches cut as its workers would."""
    train, lengths = job.train, rows.train.lengths
    epochs = [batches_of(lengths, train, epoch) for epoch in range(train.epochs)]
    parts = [
        part
        for batch in epochs[0]
        for worker in shares(batch, job.scale.least_workers, train.gradient_accumulation_steps)
        for part in worker
        if len(part)
    ]
    longest, widens = int(lengths.max()), coarse(job)
    sizes = [(len(part), width_of(lengths[part], widens, longest)) for part in parts]
    return Work(
        train_rows=len(rows.train),
        validation_rows=len(rows.validation),
        labels=len(rows.labels),
        epochs=train.epochs,
        steps_per_epoch=len(epochs[0]),
        steps=sum(map(len, epochs)),
        tokens_per_epoch=int(lengths.sum()),
        padding=padding(lengths, parts, sizes),
        longest_row=longest,
        rows_cut=rows.train.cut + rows.validation.cut,
        microbatch=max(sizes, key=lambda size: size[0] * size[1]),
    )


def padding(lengths: np.ndarray, batches: Iterable[np.ndarray], sizes: Iterable[tuple[int, int]]) -> float:
    """The share of the cells of ``batches``, of (rows, columns) each, that hold no token."""
    tokens = sum(int(lengths[batch].sum()) for batch in batches)
    return 1 - tokens / sum(rows * columns for rows, columns in sizes)


def _corner_shapes(corners: Iterable[tuple[str, JobConfig]]) -> list[tuple[str, Shape]]:
    """The models at the corners of a space, with the key; refused as a search refuses them."""
    shapes = []
    for key, corner in corners:
        check(corner)
        if key.split(".")[0] in STRUCTURAL:
            shapes.append((key, shaped(corner, prepare(corner))))
    return shapes


def _frozen(shape: Shape, chosen: bool) -> Frozen:
    job, model, rows = shape.job, shape.model, shape.rows
    first = _first_only(model)
    bf16 = precision(job) == "bf16"
    train = decide(job, model, rows.train.lengths, bf16, first)
    # Evaluation is in fp32.
    validation = decide(job, model, rows.validation.lengths, False, first)
    keep = train is not None and train.keep
    return Frozen(
        freeze=job.to_json()["freeze"],
        chosen=chosen,
        trained=shape.trained,
        checkpoint_bytes=checkpoint_bytes(shape),
        depth=train.depth if train else None,
        keep=keep,
        reason=train.reason if train else "its bottom is trained, or has no cut",
        prefix_bytes=train.bytes + validation.bytes if train and validation and keep else 0,
    )


def _first_only(model: Any) -> bool:
    """Whether the top block is expected to be cut to the position that the head reads."""
    try:
        blocks = find_blocks(model)
    except ModelError:
        return False
    top = model.base_model.get_submodule(blocks.stack)[-1]
    return any(path in AFTER_ATTENTION for path, _ in top.named_modules())


def _disk(own: Shape, freezes: tuple[Frozen, ...]) -> Disk:
    job, rows = own.job, own.rows
    checkpoint = checkpoint_bytes(own)
    run = (job.train.keep_checkpoints + 1) * checkpoint
    if job.train.checkpoint_budget_gib:
        run = min(run, int(job.train.checkpoint_budget_gib * GIB))
    # Choices with the same bottom share its states.
    states = sum({frozen.depth: frozen.prefix_bytes for frozen in freezes}.values())
    return Disk(
        checkpoint_bytes=checkpoint,
        run_bytes=run,
        tokens_bytes=_tokens_bytes(job, (rows.train, rows.validation)),
        prefix_bytes=min(states, int(job.cache.budget_gib * GIB)),
        free_bytes=None if is_url(job.storage) else shutil.disk_usage(token_cache(job)).free,
    )


def _tokens_bytes(job: JobConfig, splits: Iterable[Tokens]) -> int:
    """What the entries of the token cache take, as they are."""
    folders = {token_cache(job) / tokens.digest for tokens in splits}
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*"))


def _study(job: JobConfig, checkpoint: int) -> Study:
    """``checkpoint``: bytes of the largest one that a trial can have."""
    search = search_of(job)
    together = at_once(job, os.cpu_count() or 1, torch.cuda.device_count() if job.scale.gpus_per_worker else 0)
    disk = 2 * search.points * checkpoint
    if search.disk_budget_gib:
        disk = min(disk, int(search.disk_budget_gib * GIB))
    return Study(search.points, together, -(-search.points // together), disk)
