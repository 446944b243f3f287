"""What a step makes smaller: the mean loss of a global batch, whoever computes which rows of it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from banjoray.config.job import JobConfig
from banjoray.data.tokens import Tokens
from banjoray.errors import ConfigError
from banjoray.tasks.task import Task

Loss = Callable[[Any], Tensor]
"""A model's outputs -> what these rows add to the batch's loss; a number on the outputs' device."""


class Objective:
    """The loss of a job's task, smoothed and weighted as the job says."""

    def __init__(self, job: JobConfig, task: Task, tokens: Tokens, labels: Sequence[str]) -> None:
        self._task = task
        self._smoothing = job.train.label_smoothing
        self._weights = row_weights(job, task, tokens, labels)

    def total(self, batch: np.ndarray) -> float:
        """The weight of all rows of a batch."""
        return float(self._weights[batch].sum(dtype=np.float64))

    def share(self, rows: np.ndarray, targets: np.ndarray, total: float, empty: bool) -> Loss:
        """The loss of ``rows`` as their part of a batch of weight ``total``; of no weight where ``empty``.

        ``targets`` are what these rows have to find, (rows, ...).
        """
        # A batch in which nothing is to be found has no weight at all.
        none = empty or not total
        weights = np.zeros(len(rows), np.float32) if none else (self._weights[rows] / total).astype(np.float32)

        def loss(outputs: Any) -> Tensor:
            device = outputs[0].device
            losses = self._task.losses(outputs, torch.from_numpy(targets).to(device), self._smoothing)
            return torch.dot(losses, torch.from_numpy(weights).to(device))

        return loss


def row_weights(job: JobConfig, task: Task, tokens: Tokens, labels: Sequence[str]) -> np.ndarray:
    """The weight of every feature (features,): what the task says, times that of its label.

    ``balanced`` is scikit-learn's: rows / (labels x rows of the label). A mean over rows divides by their weights, so
    only ratios count. Raises ConfigError: a label that the data does not have, a task whose rows have none.
    """
    wanted, targets = job.train.class_weights, np.asarray(tokens.targets)
    if wanted == "none":
        return task.weights(tokens, job)
    if not task.weighted:
        why = (
            f"rows of {task.name} don't have one label each" if task.labelled else f"rows of {task.name} have no label"
        )
        raise ConfigError(f"train.class_weights: found {wanted!r}; {why}, so needed none")
    if wanted == "balanced":
        counts = np.bincount(targets, minlength=len(labels))
        by_label = len(targets) / (len(labels) * np.maximum(counts, 1))
    else:
        unknown = sorted(set(wanted) - set(labels))
        if unknown:
            raise ConfigError(f"train.class_weights: no label {unknown[0]!r} in the data; it has {', '.join(labels)}")
        by_label = np.array([wanted.get(label, 1.0) for label in labels])
    weights: np.ndarray = by_label[targets].astype(np.float32)
    return weights
