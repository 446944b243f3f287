"""Rows whose label hangs on rounding, computed in fp32 as well.

Rounding moves the logits of a row against each other a little: how far at most it raises the highest over another, the
probe rows show. Only where the two highest are nearer than that can the label be another. Of a trained version that is
a few rows in a hundred; they are given to the graph in fp32 too, and its logits are the answer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What `OnBorders` costs is worth it up to this share of the rows: a graph in fp32 takes twice the time of one in int8.
MOST_AGAIN = 0.15


class OnBorders:
    """A model with rounded weights, and the same in fp32 for rows whose two highest logits are within ``border``."""

    def __init__(self, rounded: Any, plain: Callable[..., Any], border: float) -> None:
        self.rounded, self.plain, self._border = rounded, plain, border
        self.config = rounded.config

    def __call__(self, **inputs: Tensor) -> Any:
        """The outputs of the rounded model; ``logits``, (rows, labels), are those in fp32 for rows on a border."""
        found = self.rounded(**inputs)
        highest = found.logits.topk(2).values
        near = highest[:, 0] - highest[:, 1] <= self._border
        if near.any():
            longest = int(inputs["attention_mask"][near].sum(1).max())
            found.logits[near] = self.plain(**{name: cells[near, :longest] for name, cells in inputs.items()}).logits
        return found

    def to(self, device: torch.device) -> "OnBorders":
        """Itself; raises ConfigError on a device that its graphs do not run on."""
        self.rounded.to(device)
        return self


def border_of(rounded: Sequence[np.ndarray], plain: Sequence[np.ndarray]) -> float:
    """How far rounding raised the highest logit of a row over another one at most; logits are (labels,) each.

    A row's highest one is another in fp32 only if rounding raised it so by at least what lies between the two.
    """
    found = np.stack(rounded)
    fell = np.stack(plain) - found
    highest = found.argmax(axis=1, keepdims=True)
    return float((fell - np.take_along_axis(fell, highest, axis=1)).max())


def share_within(logits: Sequence[np.ndarray], border: float) -> float:
    """The share of rows whose two highest logits are within ``border`` of each other."""
    highest = np.sort(np.stack(logits), axis=1)
    return float((highest[:, -1] - highest[:, -2] <= border).mean())
