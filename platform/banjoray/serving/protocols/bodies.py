"""How a request is read in every protocol: no more bytes, and no other JSON, than may be; rows through the task."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import Request

from banjoray.config.serve import ServeConfig
from banjoray.errors import RequestError
from banjoray.serving.served import Served
from banjoray.tasks.task import Ask, Task


async def body_of(request: Request, limits: ServeConfig) -> bytes:
    """The request's body; RequestError 413 as soon as it is known to be too large."""
    limit = int(limits.max_body_mib * 2**20)
    too_large = RequestError(f"the body is larger than {limit / 2**20:g} MiB", 413)
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def json_object(body: bytes, needed: str) -> dict[str, Any]:
    """The object in a body that has to hold ``needed``.

    Raises RequestError: 400 if it is not JSON, 422 if it is no object.
    """
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON ({error})", 400) from None
    if not isinstance(found, dict):
        raise RequestError(f"the body holds {type(found).__name__}; needed {needed}")
    return found


def asked(inputs: Any, parameters: Mapping[str, Any], task: Task, max_rows: int) -> Ask:
    """What the task makes of inputs and parameters; RequestError 413 for too many rows, before they are looked at."""
    if isinstance(inputs, list) and len(inputs) > max_rows:
        raise RequestError(f"inputs: found {len(inputs)} rows; this endpoint takes {max_rows} in one request", 413)
    ask = task.parse(inputs, parameters)
    if len(ask.rows) > max_rows:
        # Of a text and many labels, say.
        raise RequestError(
            f"inputs: {len(ask.rows)} rows to compute; this endpoint takes {max_rows} in one request", 413
        )
    return ask


def check_task(served: Served, fit: Sequence[str], path: str) -> None:
    """Refuse, with 400, to answer at a path that does not fit what the model was trained for."""
    if served.task.name not in fit:
        raise RequestError(
            f"this model's task is {served.task.name}; {path} is answered by models for {' or '.join(fit)}", 400
        )


@contextmanager
def in_words(words: Mapping[str, str], wrong_shape: int = 422) -> Iterator[None]:
    """Errors that are raised in the block say where something stands in the client's words, of which the first counts.

    ``words``: what the task calls a place -> what the client calls it; ``wrong_shape``: the status instead of 422.
    """
    try:
        yield
    except RequestError as error:
        where, colon, rest = error.message.partition(":")
        ours = next((known for known in words if where.startswith(known)), "")
        where = words.get(ours, "") + where.removeprefix(ours)
        raise RequestError(where + colon + rest, wrong_shape if error.status == 422 else error.status) from None


def documented(
    properties: Mapping[str, Any], required: Sequence[str], answer: str, error: Mapping[str, Any]
) -> dict[str, Any]:
    """What a route that takes an object says of itself in the OpenAPI document; ``error`` is the schema of errors."""
    body = {"type": "object", "required": list(required), "properties": dict(properties)}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}},
        "responses": {200: {"description": answer, "content": {"application/json": {}}}} | refusals(error),
    }


def refusals(error: Mapping[str, Any]) -> dict[int | str, dict[str, Any]]:
    """What a route says of its errors in the OpenAPI document."""
    told: dict[int | str, str] = {"4XX": "What was wrong.", 504: "No answer in time."}
    content = {"application/json": {"schema": dict(error)}}
    return {status: {"description": text, "content": content} for status, text in told.items()}


def _no_number(constant: str) -> Any:
    """Python's reader would take NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{constant} is no number in JSON")
