"""What a task has to say for itself; training, scoring and HTTP all go through one such object."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from banjoray.config.job import JobConfig
from banjoray.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Score:
    """What a model is worth on a split: metrics by name, and how often each label was taken for which.

    ``confusion[i][j]`` counts rows of label ``i`` that were answered with label ``j``.
    """

    metrics: dict[str, float]
    confusion: tuple[tuple[int, ...], ...]
    labels: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The score as plain values."""
        return {"metrics": self.metrics, "confusion": [list(row) for row in self.confusion], "labels": self.labels}


class Task(Protocol):
    """One kind of work, end to end."""

    name: str
    auto_model: str
    """The transformers class that loads a model for this task."""
    metrics: tuple[str, ...]
    """Names of the metrics in a score; every one may be asked for in a job file."""

    def losses(self, outputs: Any, targets: "Tensor", smoothing: float) -> "Tensor":
        """The loss of every row (rows,), fp32, of a model's outputs against ``targets`` (rows,), in nats.

        ``smoothing`` is the share of each target that is spread over all labels.
        """
        ...

    def score(self, outputs: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> Score:
        """The score of raw model outputs, one row each, in the order of ``targets``."""
        ...

    def parse(self, inputs: Any) -> list[dict[str, str]]:
        """The rows in the ``inputs`` of an HTTP request; raises RequestError that says what was wrong."""
        ...

    def answer(self, outputs: np.ndarray, labels: Sequence[str], parameters: Mapping[str, Any]) -> Any:
        """The answer for one row of raw outputs; raises RequestError for parameters that it does not know."""
        ...


def task_for(name: str) -> Task:
    """The task of that name."""
    from banjoray.tasks.text_classification import TextClassification

    tasks: dict[str, Task] = {TextClassification.name: TextClassification()}
    return tasks[name]


def check_metrics(job: JobConfig) -> None:
    """Refuse a metric that the job's task does not have."""
    known = task_for(job.task).metrics
    for key, metric in (("train.metric", job.train.metric), ("registry.gate.metric", job.registry.gate.metric)):
        if metric not in known:
            raise ConfigError(f"{key}: {job.task} has no metric {metric!r}; it has {', '.join(known)}")
