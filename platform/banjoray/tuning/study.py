"""A search and its trials, as plain values."""

from dataclasses import dataclass, field
from typing import Any


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
