"""The request and answer of Hugging Face's inference API, as `huggingface_hub.InferenceClient` sends and reads them."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from banjoray.errors import RequestError
from banjoray.serving.protocols.bodies import asked, body_of, json_object
from banjoray.serving.replica import Replica
from banjoray.serving.streaming import BROKEN, EventStream, event, log_broken
from banjoray.tasks.task import Ask, Task

_NEEDED = '{"inputs": ..., "parameters": {...}}'

# Which shapes there are depends on the task; GET / names it.
_INPUTS = (
    "A text, a list of texts, or objects: text and text_pair, question and context, source_sentence and sentences; "
    "of text-generation also messages."
)
_BODY = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "inputs": {
            "description": _INPUTS,
            "example": "what a lovely surprise",
            "anyOf": [{"type": kind} for kind in ("string", "array", "object")],
        },
        "parameters": {"type": "object", "description": "As the task has them; an unknown one is refused by name."},
        "stream": {"type": "boolean", "description": "text-generation: an event per token; one text, no beams."},
    },
}
ERROR = {"type": "object", "properties": {"error": {"type": "string"}}}
_DOCUMENTED: dict[str, Any] = {
    "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": _BODY}}}},
    "responses": {
        200: {
            "description": "As Hugging Face's client reads the task; with stream: true events, an error the last.",
            "content": {"application/json": {}, "text/event-stream": {"schema": {"type": "string"}}},
        }
    }
    | {
        status: {"description": text, "content": {"application/json": {"schema": ERROR}}}
        for status, text in {
            400: "Not JSON.",
            401: "No known key.",
            404: "Another model.",
            408: "The body stopped half way.",
            413: "Too large.",
            422: "Wrong shape.",
            429: "Too much waits; Retry-After says for how long.",
            504: "No answer in time.",
        }.items()
    },
}


def routes(replica: Callable[[], Replica]) -> APIRouter:
    """``POST /``, where there is one model, and ``POST /models/{name}``."""
    router = APIRouter(tags=["Hugging Face"])

    @router.post("/", summary="Answer rows", **_DOCUMENTED)
    async def answer(request: Request) -> Response:
        """Hugging Face's inference schema for the task that the model was trained for."""
        return await _answer(replica(), request, None)

    @router.post("/models/{name}", summary="Answer rows, by the model's name", **_DOCUMENTED)
    async def answer_model(name: str, request: Request) -> Response:
        """The same as ``POST /``, at the path that `huggingface_hub.InferenceClient` uses."""
        return await _answer(replica(), request, name)

    return router


def refusal(message: str, status: int) -> JSONResponse:
    """An error as Hugging Face's clients read it."""
    return JSONResponse({"error": message}, status)


async def _answer(replica: Replica, request: Request, name: str | None) -> Response:
    served = replica.pick(name)
    ask = parse(await body_of(request, replica.limits), served.task, replica.limits.max_rows)
    if ask.stream:
        return EventStream(events(await served.stream(ask)), served.headers)
    return JSONResponse((await served.answer(ask)).body, headers=served.headers)


def parse(body: bytes, task: Task, max_rows: int) -> Ask:
    """The rows and parameters in a request body: {"inputs": ..., "parameters": {...}}.

    Other keys count as parameters (the client sends some so: normalize, truncate), but for "options", which old clients
    send to a hosted service. Raises RequestError: 400 if it is not JSON, 413 for too many rows, 422 for another shape.
    """
    request = json_object(body, _NEEDED)
    if "inputs" not in request:
        raise RequestError(f"the body holds keys {sorted(request)}; needed {_NEEDED}")
    parameters = request.get("parameters")
    if not isinstance(parameters, dict | None):
        raise RequestError(f"parameters: found {type(parameters).__name__}; needed an object")
    beside = {key: value for key, value in request.items() if key not in ("inputs", "parameters", "options")}
    return asked(request["inputs"], beside | (parameters or {}), task, max_rows)


async def events(pieces: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
    """The pieces of an answer as server-sent events, in the shape of text-generation-inference.

    What goes wrong on the way, when the status has been sent, is the last event: {"error", "error_type"}, which the
    client raises. Closing it closes ``pieces``.
    """
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                yield event(piece)
        except Exception as error:  # noqa: BLE001  the boundary to the client, who can be told in no other way
            log_broken(error)
            yield event({"error": BROKEN, "error_type": "generation"})
