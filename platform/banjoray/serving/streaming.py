"""Answers that are sent piece by piece while they are made."""

import json
import logging
import traceback
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Send

BROKEN = "the answer broke off; the server's log says why"
_LOG = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """A response of server-sent events; ``events`` are closed as soon as nobody reads on, wherever that is noticed."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(events, headers={"cache-control": "no-cache"} | dict(headers))
        self._events = events

    async def stream_response(self, send: Send) -> None:
        """Send all events; a client that goes away cancels this, or makes ``send`` raise."""
        try:
            await super().stream_response(send)
        finally:
            await self._events.aclose()


def event(found: Any) -> bytes:
    """A server-sent event that holds JSON, in ASCII: some clients take letters such as U+2028 for the end of a line."""
    return f"data: {json.dumps(found, allow_nan=False)}\n\n".encode("ascii")


def log_broken(error: Exception) -> None:
    """Tell the log what broke a stream off and where; not what the error says, which may hold a request's texts."""
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    _LOG.error("a stream broke off: %s at %s", type(error).__name__, ", ".join(frames))
