"""Rows of many requests in one forward pass. Plain asyncio: no Ray, no HTTP.

While one pass runs, rows queue up; the next pass takes the row that has waited longest and the rows nearest to it in
length, as long as rows x longest stays within a budget. With nobody else waiting, a row starts at once.

A stream has the thread to itself from its first piece to its last: rows and other streams wait for its end, as they do
for that of a pass. It begins when the pass that runs has ended, after streams that were asked for before it.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


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


class Batcher(Generic[Row, Output]):
    """Turns single rows into batches for ``forward``, which runs in one thread beside the event loop.

    ``max_tokens`` bounds rows x longest of a batch; a longer row goes alone.
    """

    def __init__(self, forward: Callable[[Sequence[Row]], Sequence[Output]], max_tokens: int) -> None:
        self._forward = forward
        self._max_tokens = max_tokens
        self._waiting: list[_Waiting[Row, Output]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="banjoray-forward")
        self._worker: asyncio.Task[None] | None = None

    async def outputs(self, rows: Sequence[Row]) -> list[Output]:
        """The outputs of some rows, in their order; they may be computed in several batches.

        Raises what ``forward`` raised for the batch of a row. Rows of a cancelled call are not computed.
        """
        loop = asyncio.get_running_loop()
        mine = [_Waiting[Row, Output](row, loop.create_future()) for row in rows]
        self._waiting.extend(mine)
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._drain())
        return list(await asyncio.gather(*(waiting.output for waiting in mine)))

    async def stream(self, write: Callable[[Callable[[Piece], None]], None]) -> AsyncGenerator[Piece, None]:
        """What ``write``, which runs in the thread of ``forward``, tells the function that it is given, as it tells it.

        Raises what ``write`` raises. Closing the generator makes that function raise, which has to end ``write``; one
        that has not begun does not begin. A listener who is slow holds up nobody: pieces wait for it here, as many as
        ``write`` has, so that has to be bounded.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[Piece, ...]] = asyncio.Queue()
        left = threading.Event()

        def tell(piece: Piece) -> None:
            if left.is_set():
                raise _Left
            loop.call_soon_threadsafe(pieces.put_nowait, (piece,))

        def whole() -> None:
            if not left.is_set():
                write(tell)

        written = loop.run_in_executor(self._thread, whole)
        # Comes after every piece: the loop calls what it is given in order.
        written.add_done_callback(lambda _: pieces.put_nowait(()))
        try:
            while piece := await pieces.get():
                yield piece[0]
            await written
        finally:
            left.set()
            written.cancel()

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._take():
            try:
                outputs = await loop.run_in_executor(self._thread, self._forward, [waiting.row for waiting in batch])
                answered = list(zip(batch, outputs, strict=True))
            except Exception as error:  # noqa: BLE001  the boundary between requests: one batch fails, the rest go on
                for waiting in batch:
                    if not waiting.output.done():
                        waiting.output.set_exception(error)
                continue
            for waiting, output in answered:
                if not waiting.output.done():
                    waiting.output.set_result(output)

    def _take(self) -> list[_Waiting[Row, Output]]:
        """The next batch: the oldest row, then its neighbours in length, shorter ones first."""
        self._waiting = [waiting for waiting in self._waiting if not waiting.output.done()]
        if not self._waiting:
            return []
        oldest = self._waiting[0]
        longest = len(oldest.row)
        others = self._waiting[1:]
        shorter = sorted((w for w in others if len(w.row) <= longest), key=lambda w: -len(w.row))
        longer = sorted((w for w in others if len(w.row) > longest), key=lambda w: len(w.row))
        batch = [oldest]
        for waiting in shorter + longer:
            longest = max(longest, len(waiting.row))
            if (len(batch) + 1) * longest > self._max_tokens:
                break
            batch.append(waiting)
        taken = set(map(id, batch))
        self._waiting = [waiting for waiting in self._waiting if id(waiting) not in taken]
        return batch
