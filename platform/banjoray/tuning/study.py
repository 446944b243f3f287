"""A search and its trials, as plain values: while it goes on, and what it leaves behind."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TrialMoment:
    """How far a trial is, for people who watch a study.

    ``epoch`` of ``epochs`` is the last one that is finished (0: none since it was started) and ``score`` what it
    reached; ``best`` is the trial's best at any epoch (None: it has no score). ``seconds`` are its own, over all
    starts. ``states`` says what became of the states of a frozen bottom: computed, read, or nothing. ``reason`` is why
    it failed; ``earlier``: it had ended when a study that was stopped went on.
    """

    trial: str
    values: dict[str, Any]
    epochs: int
    epoch: int = 0
    score: float | None = None
    best: float | None = None
    seconds: float = 0.0
    states: str = ""
    status: Literal["running", "done", "stopped", "failed"] = "running"
    reason: str = ""
    earlier: bool = False

    def line(self, metric: str) -> str:
        """What a log gets of it: finished epochs and failures; empty for anything else."""
        if self.earlier:
            return ""
        if self.status == "failed":
            return f"  trial {self.trial}  failed: {self.reason}"
        if self.status != "running" or self.score is None:
            return ""
        values = ", ".join(
            f"{key} {value:.2e}" if isinstance(value, float) else f"{key} {value}" for key, value in self.values.items()
        )
        return f"  trial {self.trial}  epoch {self.epoch}  {metric} {self.score:.4f}  ({values})"


Watch = Callable[[TrialMoment], object]


def in_lines(say: Callable[[str], object], metric: str) -> Watch:
    """A watcher that says a line per epoch and per failure of every trial."""

    def watch(moment: TrialMoment) -> None:
        if line := moment.line(metric):
            say(line)

    return watch


@dataclass(frozen=True)
class Trial:
    """One point of the space: what it tried, how far it ran, and the best score it reached (None: it has none).

    ``history`` has an entry per finished epoch: the validation metrics, ``epoch`` from 1, ``train_loss``. ``prefix``
    says what became of the states of a frozen bottom: computed, read, or nothing.
    """

    trial: str
    values: dict[str, Any]
    status: str
    epochs: int
    seconds: float
    score: float | None
    history: tuple[dict[str, float], ...] = ()
    prefix: str = ""

    def to_json(self) -> dict[str, Any]:
        """The trial as plain values."""
        return dict(vars(self))


@dataclass(frozen=True)
class StudyResult:
    """What a search leaves behind: the winner as a registered version, and every trial, best first.

    ``importances`` are shares of the score's variance by key, empty where there are too few scores to tell;
    ``freed_bytes`` is what checkpoints of trials that fell behind took on disk.
    """

    study_id: str
    version: str
    trial: str
    metric: str
    mode: str
    score: float
    trials: tuple[Trial, ...]
    importances: dict[str, float] = field(default_factory=dict)
    freed_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return vars(self) | {"trials": [trial.to_json() for trial in self.trials]}
