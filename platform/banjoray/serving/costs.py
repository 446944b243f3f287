"""What a forward pass costs, by its rows and the longest of them: measured at start-up, fitted, asked by batching.

The fit is of an idle machine; `Adaptive` follows what passes take later.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Row = TypeVar("Row")
# Handing a batch to the thread and its outputs back, which no measurement inside of the thread sees.
HANDOVER_S = 2e-4
# How much the newest pass counts in what is known of the others.
NEWEST = 0.1
# One pass, however slow, counts as at most so many times what was expected; and how far the machine may have changed.
MOST_AT_ONCE, MOST_IN_ALL = 2.0, 32.0
ROWS, LENGTHS = (1, 2, 4, 8, 16), (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Cost:
    """Seconds of a pass: a fixed part, and parts per row, per cell (rows x longest), per row and longest squared."""

    fixed: float = 0.0
    per_row: float = 0.0
    per_cell: float = 0.0
    per_square: float = 0.0

    def __call__(self, rows: int, longest: int) -> float:
        """Seconds of a pass over ``rows`` rows that are padded to ``longest`` tokens."""
        return self.fixed + rows * (self.per_row + longest * (self.per_cell + longest * self.per_square))


FREE = Cost()
"""Of a pass that nobody measured: batches are made by their tokens alone."""


class Adaptive:
    """A cost that follows the machine: what was fitted, times what passes take of it lately."""

    def __init__(self, fitted: Callable[[int, int], float]) -> None:
        self.fitted = fitted
        self.factor = 1.0

    def __call__(self, rows: int, longest: int) -> float:
        """Seconds of a pass over ``rows`` rows that are padded to ``longest`` tokens, as the machine is now."""
        return self.factor * self.fitted(rows, longest)

    def learn(self, rows: int, longest: int, seconds: float) -> None:
        """Note what a pass took: the factor goes a tenth of the way, in its logarithm."""
        expected = self(rows, longest)
        if expected <= 0 or seconds <= 0:
            return
        off = min(max(seconds / expected, 1 / MOST_AT_ONCE), MOST_AT_ONCE)
        self.factor = min(max(self.factor * off**NEWEST, 1 / MOST_IN_ALL), MOST_IN_ALL)


def fitted(samples: Sequence[tuple[int, int, float]]) -> Cost:
    """The cost that fits (rows, longest, seconds) best: least squares of relative errors, no part below zero."""
    from scipy.optimize import nnls

    rows, longest, seconds = (np.array(column, dtype=np.float64) for column in zip(*samples, strict=True))
    parts = np.stack([np.ones_like(rows), rows, rows * longest, rows * longest**2], axis=1)
    # Scaled, so that no part is small beside the others' rounding.
    scale = parts.max(axis=0)
    found, _ = nnls(parts / scale / seconds[:, None], np.ones(len(rows)))
    return Cost(*(found / scale).tolist())


def measured(
    forward: Callable[[list[Row]], object],
    row_of: Callable[[int], Row],
    longest: int,
    budget_s: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """The cost of ``forward``, by passes of ``row_of(tokens)`` until the time is used up.

    The longest row there is comes first, alone, since no sum of small passes tells what it costs; then small passes
    first. Every shape is tried twice and its faster pass counts.
    """
    lengths = [length for length in LENGTHS if length < longest] + [longest]
    shapes = sorted(((rows, length) for rows in ROWS for length in lengths), key=lambda shape: shape[0] * shape[1])
    shapes.insert(0, (1, longest))
    forward([row_of(lengths[0])])
    samples: list[tuple[int, int, float]] = []
    until = clock() + budget_s
    for rows, length in shapes:
        batch = [row_of(length)] * rows
        times = []
        for _ in range(2):
            began = clock()
            forward(batch)
            times.append(clock() - began)
        samples.append((rows, length, max(min(times), 1e-6)))
        if clock() > until:
            break
    found = fitted(samples)
    return Cost(found.fixed + HANDOVER_S, found.per_row, found.per_cell, found.per_square)
