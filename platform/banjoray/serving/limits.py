"""How much an endpoint takes on, and for how long: tokens, time to wait, time to answer. No Ray.

What is refused is refused before it costs a pass: 413 for a request that is too large, 429 for one too many, 504 (408
if its body never came) for one that took too long. Whoever is cancelled leaves the queue.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Generic, TypeVar
from weakref import WeakSet

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from banjoray.config.serve import ServeConfig
from banjoray.errors import RequestError
from banjoray.serving.batching import Batcher, Sized
from banjoray.serving.pace import Pace
from banjoray.serving.telemetry import Refuse, Telemetry, current

LONGEST_RETRY_S = 60
# The target where a serve config says none, of models whose passes have a cost.
USUAL_TARGET_S = 1.0

Row = TypeVar("Row", bound=Sized)
Output = TypeVar("Output")
Piece = TypeVar("Piece")
Asked = TypeVar("Asked")


class Entry(Generic[Row]):
    """A row on its way through a batcher, and when its pass began and ended."""

    __slots__ = ("began", "ended", "row")

    def __init__(self, row: Row) -> None:
        self.row = row
        self.began: float | None = None
        self.ended: float | None = None

    def __len__(self) -> int:
        return len(self.row)


class Queue(Generic[Row, Output]):
    """The rows that a replica has taken and not answered: bounded by the time they need, timed, told to telemetry."""

    def __init__(self, config: ServeConfig, telemetry: Telemetry) -> None:
        self._config = config
        self._telemetry = telemetry
        self._rows = 0
        self.paces: WeakSet[Pace] = WeakSet()
        """Of every batcher of the replica; their passes take turns in one thread."""

    def timed(
        self, forward: Callable[[Sequence[Row]], Sequence[Output | Exception]]
    ) -> Callable[[Sequence[Entry[Row]]], Sequence[Output | Exception]]:
        """``forward`` for a batcher of entries: notes when each batch began and ended."""

        def inner(entries: Sequence[Entry[Row]]) -> Sequence[Output | Exception]:
            began = time.perf_counter()
            outputs = forward([entry.row for entry in entries])
            ended = time.perf_counter()
            for entry in entries:
                entry.began, entry.ended = began, ended
            self._telemetry.batch([len(entry) for entry in entries], ended - began)
            return outputs

        return inner

    async def encoded(
        self, encode: Callable[[Sequence[Asked]], Awaitable[list[list[Row]]]], rows: Sequence[Asked]
    ) -> list[list[Row]]:
        """The features that ``encode`` makes of a request's rows.

        Raises RequestError: 429 if they would wait for too long, 413 for too many tokens.
        """
        self.check_wait()
        record = current()
        record.rows = len(rows)
        record.texts = rows if self._telemetry.log_texts else None
        began = time.perf_counter()
        encoded = await encode(rows)
        record.encode_s = time.perf_counter() - began
        record.tokens = sum(len(feature) for row in encoded for feature in row)
        most = self._config.max_tokens_per_request
        if record.tokens > most:
            raise RequestError(f"inputs: {record.tokens} tokens; this endpoint takes {most} in one request", 413)
        return encoded

    async def outputs(self, batcher: Batcher[Entry[Row], Output], rows: Sequence[Row]) -> list[Output]:
        """The batcher's outputs for some rows; raises RequestError, 429, if they would wait for too long."""
        self.check_wait()
        entries = [Entry(row) for row in rows]
        entered = time.perf_counter()
        with self._counted(len(rows)):
            outputs = await batcher.outputs(entries)
        began = [entry.began for entry in entries if entry.began is not None]
        ended = [entry.ended for entry in entries if entry.ended is not None]
        if began:
            record = current()
            record.queue_s = min(began) - entered
            record.forward_s = max(ended) - min(began)
        return outputs

    async def stream(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
        """The same pieces; until they end they count as a row. Closing it closes ``pieces``."""
        with self._counted(1):
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece

    @contextmanager
    def _counted(self, rows: int) -> Iterator[None]:
        self._rows += rows
        self._telemetry.queued(self._rows)
        try:
            yield
        finally:
            self._rows -= rows
            self._telemetry.queued(self._rows)

    def check_wait(self) -> None:
        """Raise RequestError, 429, where a request would wait for others for longer than the target.

        What it takes by itself does not count: one that is large would have to find an idle replica.
        """
        target, wait_s = self._config.latency_target_ms, sum(pace.wait_s() for pace in self.paces)
        usual_s = USUAL_TARGET_S if all(pace.measured for pace in self.paces) else self._config.timeout_s
        most_s = usual_s if target is None else target / 1000
        if wait_s <= most_s:
            return
        retry_s = min(LONGEST_RETRY_S, math.ceil(wait_s))
        told = f"what waits here will take {wait_s:.2g} s, {most_s:g} s may; try again in {retry_s} s"
        raise RequestError(told, 429, {"retry-after": str(retry_s)})


class Admitted:
    """ASGI middleware that refuses a POST for which ``check`` raises RequestError, before anything of it is read.

    Under overload most of what a replica does is to refuse. By way of the routes that takes four times as long.
    """

    def __init__(self, app: ASGIApp, check: Callable[[], None], refuse: Refuse) -> None:
        self._app = app
        self._check = check
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        app = self._app
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                self._check()
            except RequestError as error:
                app = self._refuse(scope, error.message, error.status, error.headers or {})
        await app(scope, receive, send)


class Bounded:
    """ASGI middleware that ends a request whose answer has not begun in time, and what it waits for.

    ``timeout_s`` gives the replica's. 504; 408 if it is the rest of the body that has not come.
    """

    def __init__(self, app: ASGIApp, timeout_s: Callable[[], float], refuse: Refuse) -> None:
        self._app = app
        self._timeout_s = timeout_s
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit_s, reading = self._timeout_s(), False

        async def receiving() -> Message:
            nonlocal reading
            reading = True
            message = await receive()
            reading = False
            return message

        limit = asyncio.timeout(limit_s)

        async def sending(message: Message) -> None:
            if limit.when() is not None and not limit.expired():
                limit.reschedule(None)
            await send(message)

        try:
            async with limit:
                await self._app(scope, receiving, sending)
        except TimeoutError:
            if not limit.expired():
                raise
            told = "the body did not come" if reading else "no answer"
            answer = self._refuse(scope, f"{told} within {limit_s:g} s", 408 if reading else 504, {})
            await answer(scope, receive, send)
