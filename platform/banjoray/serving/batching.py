"""Rows of many requests in one forward pass. Plain asyncio: no Ray, no HTTP.

While one pass runs, rows queue up; the next pass takes the row that is due first and the rows nearest to it in length,
as long as rows x longest and the predicted time of the pass stay within their budgets, and padding costs less than the
pass that it saves. With nobody else waiting, a row starts at once. Where more wait than a pass takes, the next pass is
handed to the thread while one runs.

A row is due when it has come plus a few times what it costs alone, in predicted seconds of passes made: short rows pass
a long one, but only for so long. After a row that takes longer than a pass should, others have as much time, though
more of its kind are due. Where passes have no cost, that is the order in which rows come.

A stream has the thread to itself from its first piece to its last: rows and other streams wait for its end, as they do
for that of a pass. It begins when the pass that runs has ended, after streams that were asked for before it.
"""

import asyncio
import math
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

from banjoray.serving.costs import FREE
from banjoray.serving.pace import FIXED_PARTS, Pace, Turn

# How many times its own cost a row can be passed by rows that came later.
PATIENCE = 4.0
# Rows that are looked at for a batch, those that are due first.
WINDOW = 512


class Costs(Protocol):
    """What a pass costs."""

    def __call__(self, rows: int, longest: int) -> float:
        """Seconds of a pass over ``rows`` rows that are padded to ``longest`` tokens."""
        ...


class Sized(Protocol):
    """Anything with a length in tokens."""

    def __len__(self) -> int: ...


Row = TypeVar("Row", bound=Sized)
Output = TypeVar("Output")
Piece = TypeVar("Piece")


class _Left(Exception):
    """Nobody listens to a stream any more."""


@dataclass
class _Waiting(Generic[Row, Output]):
    row: Row
    output: "asyncio.Future[Output]" = field(repr=False)
    due: float = 0.0
    waits: bool = True

    def settle(self, output: Output | Exception) -> None:
        """Give the row's output, or what went wrong, to whoever still waits for it."""
        if self.output.done():
            return
        if isinstance(output, Exception):
            self.output.set_exception(output)
        else:
            self.output.set_result(output)


@dataclass
class _Handed(Generic[Row, Output]):
    """A batch that the thread has, and what comes of it."""

    batch: list[_Waiting[Row, Output]]
    turn: Turn
    outputs: "asyncio.Future[Sequence[Output | Exception]]"


class Batcher(Generic[Row, Output]):
    """Turns single rows into batches for ``forward``, which runs in one thread beside the event loop.

    ``max_tokens`` bounds rows x longest of a batch, and ``target_s`` the seconds that ``cost`` predicts for it; a row
    that is above them by itself goes alone. The cost follows what passes take by ``clock``, and ``pace`` what waits.
    ``forward`` gives an exception for a row that fails alone. Batchers that share a ``thread``, of one worker, take
    turns.
    """

    def __init__(
        self,
        forward: Callable[[Sequence[Row]], Sequence[Output | Exception]],
        max_tokens: int,
        cost: Costs = FREE,
        target_s: float = math.inf,
        thread: ThreadPoolExecutor | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._forward = forward
        self._limits = Limits(max_tokens, target_s)
        self.pace = Pace(cost, target_s, clock)
        self._cost = self.pace.cost
        # By when they are due; the predicted seconds of all passes made so far are the clock.
        self._waiting: list[_Waiting[Row, Output]] = []
        self._spent = 0.0
        # Until then, on that clock, long rows let others go first.
        self._rest = 0.0
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="banjoray-forward")
        self._worker: asyncio.Task[None] | None = None

    async def outputs(self, rows: Sequence[Row]) -> list[Output]:
        """The outputs of some rows, in their order; they may be computed in several batches.

        Raises what ``forward`` raised for the batch of a row, or gave for the row. Rows of a call that is cancelled, or
        has failed, are not computed.
        """
        loop = asyncio.get_running_loop()
        mine = [
            _Waiting[Row, Output](row, loop.create_future(), self._spent + PATIENCE * self._cost(1, len(row)))
            for row in rows
        ]
        for waiting in mine:
            insort(self._waiting, waiting, key=attrgetter("due"))
            self.pace.joined(len(waiting.row))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._drain())
        try:
            return list(await asyncio.gather(*(waiting.output for waiting in mine)))
        finally:
            for waiting in mine:
                if waiting.waits:
                    waiting.output.cancel()
                    self.pace.left(len(waiting.row))

    async def stream(self, write: Callable[[Callable[[Piece], None]], None]) -> AsyncGenerator[Piece, None]:
        """What ``write``, which runs in the thread of ``forward``, tells the function that it is given, as it tells it.

        Raises what ``write`` raises. Closing the generator makes that function raise, which has to end ``write``; one
        that has not begun does not begin. A listener who is slow holds up nobody: pieces wait for it here, as many as
        ``write`` has, so that has to be bounded.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[Piece, ...]] = asyncio.Queue()
        left = threading.Event()
        turn = self.pace.streaming()

        def tell(piece: Piece) -> None:
            if left.is_set():
                raise _Left
            loop.call_soon_threadsafe(pieces.put_nowait, (piece,))

        def whole() -> None:
            if not left.is_set():
                with self.pace.timed(turn):
                    write(tell)

        written = loop.run_in_executor(self._thread, whole)

        def over(_: object) -> None:
            self.pace.ended(turn)
            pieces.put_nowait(())

        # Comes after every piece: the loop calls what it is given in order.
        written.add_done_callback(over)
        try:
            while piece := await pieces.get():
                yield piece[0]
            await written
        finally:
            left.set()
            written.cancel()

    async def _drain(self) -> None:
        handed: deque[_Handed[Row, Output]] = deque()
        while True:
            if not handed:
                self._hand(handed)
            # Where many wait, the thread has its next pass before this one's end is noticed: a loop that is busy with
            # what it refuses comes to that late.
            if handed and self.pace.measured and len(self._waiting) > 2 * len(handed[0].batch):
                self._hand(handed)
            if not handed:
                return
            found = handed.popleft()
            try:
                answered = list(zip(found.batch, await found.outputs, strict=True))
                self.pace.ended(found.turn)
            except Exception as error:  # noqa: BLE001  the boundary between requests: one batch fails, the rest go on
                self.pace.ended(found.turn, told=False)
                answered = [(waiting, error) for waiting in found.batch]
            for waiting, output in answered:
                waiting.settle(output)

    def _hand(self, handed: "deque[_Handed[Row, Output]]") -> None:
        """Hand the next batch to the thread, if any row waits."""
        if batch := self._take():
            rows = [waiting.row for waiting in batch]
            turn = self.pace.passing([len(row) for row in rows])
            outputs = asyncio.get_running_loop().run_in_executor(self._thread, self._passed, turn, rows)
            handed.append(_Handed(batch, turn, outputs))

    def _passed(self, turn: Turn, rows: Sequence[Row]) -> Sequence[Output | Exception]:
        """A pass, in the thread."""
        with self.pace.timed(turn):
            return self._forward(rows)

    def _take(self) -> list[_Waiting[Row, Output]]:
        """The next batch, from the rows that are due first."""
        window: list[_Waiting[Row, Output]] = []
        seen = 0
        while seen < len(self._waiting) and len(window) < WINDOW:
            if not self._waiting[seen].output.done():
                window.append(self._waiting[seen])
            seen += 1
        most = self._limits.most_s(self._cost)
        if window and self._spent < self._rest:
            short = (number for number, waiting in enumerate(window) if self._cost(1, len(waiting.row)) <= most)
            window.insert(0, window.pop(next(short, 0)))
        lengths = [len(waiting.row) for waiting in window]
        chosen = batch_of(lengths, self._cost, self._limits)
        taken = set(chosen)
        self._waiting[:seen] = [waiting for number, waiting in enumerate(window) if number not in taken]
        if chosen:
            took = self._cost(len(chosen), max(lengths[number] for number in chosen))
            self._spent += took
            if took > most:
                self._rest = self._spent + took
        batch = [window[number] for number in chosen]
        for waiting in batch:
            waiting.waits = False
        return batch


@dataclass(frozen=True)
class Limits:
    """What a batch of several rows stays within: rows x longest, and predicted seconds."""

    max_tokens: int
    target_s: float = math.inf

    def most_s(self, cost: Costs) -> float:
        """Up to how many predicted seconds rows join a pass, under a cost."""
        return max(self.target_s, FIXED_PARTS * cost(0, 0))


def batch_of(lengths: Sequence[int], cost: Costs, limits: Limits) -> list[int]:
    """Which rows make the next batch: the first, then its neighbours in length, shorter ones first.

    Padding a row to the longest of the batch is work for nothing. Rows join as long as all of that costs no more than
    the fixed part of another pass, which they would need by themselves.
    """
    if not lengths:
        return []
    fixed = cost(0, 0)
    most = limits.most_s(cost)
    first = lengths[0]
    others = range(1, len(lengths))
    shorter = sorted((row for row in others if lengths[row] <= first), key=lambda row: -lengths[row])
    longer = sorted((row for row in others if lengths[row] > first), key=lambda row: lengths[row])
    batch, longest, useful = [0], first, cost(1, first) - fixed
    for group in (shorter, longer):
        for row in group:
            rows, width = len(batch) + 1, max(longest, lengths[row])
            own = cost(1, lengths[row]) - fixed
            whole = cost(rows, width)
            wasted = whole - fixed - useful - own
            # What rounding leaves of nothing is nothing.
            if rows * width > limits.max_tokens or whole > most or wasted > fixed + 1e-9 * whole:
                break
            batch.append(row)
            longest, useful = width, useful + own
    return batch
