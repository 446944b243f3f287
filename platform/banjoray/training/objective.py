"""What a step makes smaller: the mean loss of a global batch, whoever computes which rows of it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from banjoray.config.job import JobConfig
from banjoray.errors import ConfigError
from banjoray.tasks.task import Task

Loss = Callable[[Any], Tensor]
"""A model's outputs -> what these rows add to the batch's loss; a number on the outputs' device."""


class Objective:
    """The loss of a job's task, smoothed and weighted as the job says."""

    def __init__(self, job: JobConfig, task: Task, targets: np.ndarray, labels: Sequence[str]) -> None:
        self._task, self._targets = task, targets
        self._smoothing = job.train.label_smoothing
        self._weights = row_weights(job, targets, labels)

    def total(self, batch: np.ndarray) -> float:
        """The weight of all rows of a batch."""
        return float(self._weights[batch].sum(dtype=np.float64))

    def share(self, rows: np.ndarray, total: float, empty: bool) -> Loss:
        """The loss of ``rows`` as their part of a batch of weight ``total``; of no weight where ``empty``."""
        weights = np.zeros(len(rows), np.float32) if empty else (self._weights[rows] / total).astype(np.float32)
        targets = self._targets[rows]

        def loss(outputs: Any) -> Tensor:
            device = outputs.logits.device
            losses = self._task.losses(outputs, torch.from_numpy(targets).to(device), self._smoothing)
            return torch.dot(losses, torch.from_numpy(weights).to(device))

        return loss


def row_weights(job: JobConfig, targets: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """The weight of every row (rows,), by its label.

    ``balanced`` is scikit-learn's: rows / (labels x rows of the label). A mean over rows divides by their weights, so
    only ratios count. Raises ConfigError: a label that the data does not have.
    """
    wanted = job.train.class_weights
    if wanted == "none":
        return np.ones(len(targets), dtype=np.float32)
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
