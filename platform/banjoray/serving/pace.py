"""How long what a batcher holds will take, and so what the next request would wait. Plain numbers: no thread, no loop.

Rows that wait will share passes, so that their costs alone are too much. What counts is their own parts, without the
fixed part of a pass, times what the passes that others waited behind came to per own part of their rows: that holds the
fixed parts and the padding. Where passes have no cost (models that write texts), a row takes the mean time of rows.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from banjoray.serving.costs import NEWEST, Adaptive

# Of a pass that the fixed part is most of, so many are worth as much as one that is in time.
FIXED_PARTS = 4.0


@dataclass(eq=False)
class Turn:
    """A pass, or a stream, that was handed to the thread; ``began`` when the thread came to it."""

    rows: int
    longest: int
    began: float | None = None
    took_s: float | None = None


class Pace:
    """What waits and what runs, in predicted seconds; it learns from every turn that ends.

    ``target_s`` is what a pass of several rows stays within.
    """

    def __init__(
        self,
        fitted: Callable[[int, int], float],
        target_s: float = math.inf,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.cost = Adaptive(fitted)
        self.clock = clock
        self.measured = fitted(1, 1) > 0
        """Whether passes have a cost."""
        self._fixed = fitted(0, 0)
        # What passes that others waited behind cost of late, and the own parts of their rows: at first a full pass.
        self._full = max(target_s if math.isfinite(target_s) else 1.0, FIXED_PARTS * self._fixed)
        self._own_of_full = self._full - self._fixed
        self._row_s = 0.0
        self._rows = 0
        self._work = 0.0
        self._turns: set[Turn] = set()

    def joined(self, length: int) -> None:
        """A row waits."""
        self._rows += 1
        self._work += self._own(length)

    def left(self, length: int) -> None:
        """It waits no more."""
        self._rows -= 1
        # What rounding leaves of nothing is nothing.
        self._work = self._work - self._own(length) if self._rows else 0.0

    def passing(self, lengths: Sequence[int]) -> Turn:
        """The pass of some rows that waited."""
        rows, longest = len(lengths), max(lengths)
        for length in lengths:
            self.left(length)
        own = sum(map(self._own, lengths))
        if self._rows:
            self._full += NEWEST * (self.cost.fitted(rows, longest) - self._full)
            self._own_of_full += NEWEST * (own - self._own_of_full)
        return self._with(Turn(rows, longest))

    def streaming(self) -> Turn:
        """A stream, which counts as a row."""
        return self._with(Turn(1, 0))

    def ended(self, turn: Turn, told: bool = True) -> None:
        """A turn is over; what it took teaches nothing unless ``told``, as where it failed."""
        self._turns.discard(turn)
        if turn.took_s is None or not told:
            return
        self.cost.learn(turn.rows, turn.longest, turn.took_s)
        # As if the rows had come one by one, each taking its share.
        kept = (1 - NEWEST) ** turn.rows if self._row_s else 0.0
        self._row_s = kept * self._row_s + (1 - kept) * turn.took_s / turn.rows

    @contextmanager
    def timed(self, turn: Turn) -> Iterator[None]:
        """The block is what the thread does in a turn. The only method that may be called from the thread."""
        turn.began = self.clock()
        try:
            yield
        finally:
            turn.took_s = self.clock() - turn.began

    def wait_s(self) -> float:
        """Predicted seconds until a row that comes now could begin, if those that wait go before it."""
        now = self.clock()
        begun = [(now - turn.began) / turn.rows for turn in self._turns if turn.began is not None]
        # Before any row has ended, each is taken to need as long as the first ones have needed by now.
        row_s = self._row_s or max(begun, default=0.0)
        left = 0.0
        for turn in self._turns:
            whole = self.cost(turn.rows, turn.longest) if self.measured else turn.rows * row_s
            left += max(0.0, whole - (now - turn.began if turn.began is not None else 0.0))
        if not self.measured:
            return left + self._rows * row_s
        shared = self._work * self._full / self._own_of_full if self._own_of_full else 0.0
        return left + (self.cost.factor * max(self._fixed + self._work, shared) if self._rows else 0.0)

    def _with(self, turn: Turn) -> Turn:
        self._turns.add(turn)
        return turn

    def _own(self, length: int) -> float:
        """What a row adds to a pass, as it was fitted."""
        return self.cost.fitted(1, length) - self._fixed
