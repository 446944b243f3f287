"""OpenAI's API, as the `openai` package sends and reads it: models, embeddings, completions, chat completions."""

import base64
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from banjoray.errors import RequestError
from banjoray.serving.protocols import completions
from banjoray.serving.protocols.bodies import asked, body_of, check_task, documented, in_words, json_object, refusals
from banjoray.serving.replica import Replica
from banjoray.serving.served import Served

PATHS: tuple[str, ...] = ("/v1/",)
# OpenAI's own codes for some statuses.
_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}
_EMBEDDING_WORDS = {"inputs": "input", "parameters.": ""}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_INPUT = {
    "description": "A text, a list of texts, token ids, or a list of lists of those.",
    "example": "what a lovely surprise",
}
_MODEL = {"type": "string", "description": "The model's name, or its name@version; may be left out."}
_EMBEDDINGS = documented(
    {
        "model": _MODEL,
        "input": _INPUT,
        "encoding_format": {"enum": ["float", "base64"]},
        "dimensions": {"type": "integer", "minimum": 1},
        "user": {"type": "string"},
    },
    ["input"],
    "A vector per text.",
    _ERROR,
)
_STREAMED = {"text/event-stream": {"schema": {"type": "string"}}}
_COMPLETIONS = documented({"model": _MODEL, "prompt": _INPUT} | completions.DOCUMENTED, ["prompt"], "Texts.", _ERROR)
_CHAT = documented(
    {"model": _MODEL, "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}}}
    | completions.DOCUMENTED,
    ["messages"],
    "The next turn.",
    _ERROR,
)
for _written in (_COMPLETIONS, _CHAT):
    _written["responses"][200]["content"] |= _STREAMED


def routes(replica: Callable[[], Replica]) -> APIRouter:
    """``/v1/models``, ``/v1/embeddings``, ``/v1/completions`` and ``/v1/chat/completions``."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.get("/models", summary="The models that answer here")
    async def models() -> Response:
        """All of them, by their names."""
        slots = replica().slots
        return JSONResponse({"object": "list", "data": [_model(slots[name].production) for name in sorted(slots)]})

    @router.get("/models/{name}", summary="One model", responses=refusals(_ERROR))
    async def model(name: str) -> Response:
        """By its name, or its name@version."""
        found = replica().pick(name)
        return JSONResponse(_model(found), headers=found.headers)

    @router.post("/embeddings", summary="Vectors of texts", **_EMBEDDINGS)
    async def embeddings(request: Request) -> Response:
        """For feature-extraction models."""
        with in_words(_EMBEDDING_WORDS, 400):
            return await _embeddings(replica(), request)

    @router.post("/completions", summary="Texts that go on", **_COMPLETIONS)
    async def complete(request: Request) -> Response:
        """For text-generation models; what is not asked for is as the version has it."""
        with in_words(completions.WORDS, 400):
            return await _completed(replica(), request, completions.TEXT)

    @router.post("/chat/completions", summary="The next turn of a conversation", **_CHAT)
    async def chat(request: Request) -> Response:
        """For text-generation models whose tokenizer has a chat template."""
        with in_words(completions.CHAT_WORDS, 400):
            return await _completed(replica(), request, completions.CHAT)

    return router


def refusal(message: str, status: int) -> JSONResponse:
    """An error as OpenAI's clients read it; ``param`` is the one that the message begins with."""
    found = re.match(r"([a-z_]+)(?:\[\d+\]|\.[a-z_]+)*: ", message)
    if status == 404 and message.startswith("model: "):
        code: str | None = "model_not_found"
    else:
        code = _CODES.get(status)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    told = {"message": message, "type": kind, "param": found[1] if found else None, "code": code}
    return JSONResponse({"error": told}, status)


def _model(served: Served) -> dict[str, Any]:
    version = served.version
    created = datetime.fromisoformat(version.created)
    return {
        "id": version.model,
        "object": "model",
        "created": int((created if created.tzinfo else created.replace(tzinfo=UTC)).timestamp()),
        "owned_by": "banjoray",
        "version": version.version,
        "task": version.task,
    }


async def _embeddings(replica: Replica, request: Request) -> Response:
    body = json_object(await body_of(request, replica.limits), '{"input": ...}')
    served = replica.pick(body.get("model"))
    check_task(served, ("feature-extraction",), "/v1/embeddings")
    known = ("model", "input", "encoding_format", "dimensions", "user")
    for key in body:
        if key not in known:
            raise RequestError(f"{key:.100}: is not known here; /v1/embeddings has {', '.join(known)}")
    form = body.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise RequestError(f"encoding_format: found {form!r:.100}; needed float or base64")
    texts = completions.texts_of(body.get("input"), served, "input")
    ask = asked(texts, {"dimensions": body.get("dimensions")}, served.task, replica.limits.max_rows)
    answered = await served.answer(ask)
    vectors = [_told(vector) if form == "base64" else vector for vector in answered.body]
    told = {
        "object": "list",
        "data": [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(vectors)],
        "model": served.version.model,
        "usage": {"prompt_tokens": answered.tokens_read, "total_tokens": answered.tokens_read},
    }
    return JSONResponse(told, headers=served.headers)


def _told(vector: list[float]) -> str:
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode("ascii")


async def _completed(replica: Replica, request: Request, form: completions.Form) -> Response:
    body = json_object(await body_of(request, replica.limits), f'{{"{form.asks}": ...}}')
    served = replica.pick(body.get("model"))
    check_task(served, ("text-generation",), form.path)
    return await completions.answer(served, body, form)
