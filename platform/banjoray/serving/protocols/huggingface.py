"""The request and answer of Hugging Face's inference API, as `huggingface_hub.InferenceClient` sends and reads them."""

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from banjoray.errors import RequestError
from banjoray.tasks.task import Ask, Task

_LOG = logging.getLogger(__name__)


def parse(body: bytes, task: Task, max_rows: int) -> Ask:
    """The rows and parameters in a request body: {"inputs": ..., "parameters": {...}}.

    Other keys count as parameters (the client sends some so: normalize, truncate), but for "options", which old clients
    send to a hosted service. Raises RequestError: 400 if it is not JSON, 413 for too many rows, 422 for another shape.
    """
    try:
        request = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON ({error})", 400) from None
    if not isinstance(request, dict) or "inputs" not in request:
        found = f"keys {sorted(request)}" if isinstance(request, dict) else type(request).__name__
        raise RequestError(f'the body holds {found}; needed {{"inputs": ..., "parameters": {{...}}}}')
    parameters = request.get("parameters")
    if not isinstance(parameters, dict | None):
        raise RequestError(f"parameters: found {type(parameters).__name__}; needed an object")
    inputs = request["inputs"]
    if isinstance(inputs, list) and len(inputs) > max_rows:
        raise RequestError(f"inputs: found {len(inputs)} rows; this endpoint takes {max_rows} in one request", 413)
    beside = {key: value for key, value in request.items() if key not in ("inputs", "parameters", "options")}
    ask = task.parse(inputs, beside | (parameters or {}))
    if len(ask.rows) > max_rows:
        # Of a text and many labels, say.
        raise RequestError(
            f"inputs: {len(ask.rows)} rows to compute; this endpoint takes {max_rows} in one request", 413
        )
    return ask


async def events(pieces: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
    """The pieces of an answer as server-sent events, in the shape of text-generation-inference.

    What goes wrong on the way, when the status has been sent, is the last event: {"error", "error_type"}, which the
    client raises. Closing it closes ``pieces``.
    """
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                yield _event(piece)
        except Exception:  # noqa: BLE001  the boundary to the client, who can be told in no other way
            _LOG.exception("a stream broke off")
            # What it was may hold texts or paths: that is for the log, as it is of an answer that is sent whole.
            yield _event({"error": "the answer broke off; the server's log says why", "error_type": "generation"})


def _event(found: Any) -> bytes:
    # In ASCII: some clients take letters such as U+2028 for the end of a line, and of the event.
    return f"data: {json.dumps(found, allow_nan=False)}\n\n".encode("ascii")


def _no_number(constant: str) -> Any:
    """Python's reader would take NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{constant} is no number in JSON")
