"""What `fit` takes, and what it gives."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from banjoray.data.splits import Split
from banjoray.data.tokens import Tokens
from banjoray.training.checkpoints import Checkpoint


@dataclass(frozen=True)
class Rows:
    """What `fit` learns from, and is steered by; ``held`` are the validation rows themselves."""

    train: Tokens
    validation: Tokens
    labels: tuple[str, ...]
    pad_id: int
    held: Split


@dataclass(frozen=True)
class Moment:
    """How far a run is, for people who watch it. ``loss`` is that of the last step, in nats per row.

    ``padding`` is the share of the step's cells that hold no token; ``gradient_norm`` is before clipping; ``prefix``
    says what became of the states of a frozen bottom: computed, read, or nothing.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    learning_rate: float
    rows_per_s: float
    padding: float
    gradient_norm: float = 0.0
    note: str = ""
    prefix: str = ""


@dataclass(frozen=True)
class FitResult:
    """What `fit` leaves behind, equal on every worker but for the times.

    ``checkpoint`` is the best one, or where ``stopped`` (told to end before its time) the newest. ``seconds`` is the
    time of this call, evaluation and checkpoints included; ``rows_per_s`` counts training steps only; ``profile`` is
    phase -> seconds. A resumed run reports these for the part since it was resumed.
    """

    checkpoint: Checkpoint
    steps: int
    seconds: float
    rows_per_s: float
    precision: str
    stopped: bool = False
    profile: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Callbacks:
    """Where `fit` tells what it does.

    ``report`` gets the metrics of every finished epoch, on every worker, once its checkpoint is written; ``watch`` gets
    a `Moment` per step and ``scored`` the step and metrics of an epoch, both on rank 0. ``should_stop`` is asked after
    every step, on every worker; when one says yes, all write a checkpoint and end. ``exact`` waits for the GPU at every
    phase, so that the profile is right and the run slower.
    """

    report: Callable[[dict[str, float]], None] | None = None
    watch: Callable[[Moment], object] = lambda moment: None
    scored: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    should_stop: Callable[[], bool] = lambda: False
    exact: bool = False


class Loads(Protocol):
    """Makes a model."""

    def __call__(self, say: Callable[[str], None] = ..., /) -> torch.nn.Module:
        """``say`` is told what became of a head that the base has."""
        ...


@dataclass(frozen=True)
class Start:
    """What `fit` starts from: makes the model (frozen and adapted as the job says) and has its tokenizer."""

    model: Loads
    tokenizer: Any
