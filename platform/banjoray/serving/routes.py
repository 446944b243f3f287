"""The HTTP application of a replica: what it says of itself, and every protocol's routes. Knows nothing of Ray."""

from collections.abc import Callable
from typing import Protocol

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from banjoray.errors import RequestError
from banjoray.serving.protocols import huggingface, kserve, openai, tei
from banjoray.serving.replica import Replica


class Shaped(Protocol):
    """A protocol's module, as far as it is about errors."""

    PATHS: tuple[str, ...]
    """Its routes' paths, or what they begin with if that ends in a slash."""

    def refusal(self, message: str, status: int) -> JSONResponse:
        """An error as its clients read it."""
        ...


# Any other path has Hugging Face's errors.
_SHAPED: tuple[Shaped, ...] = (openai, kserve, tei)


def application(replica: Callable[[], Replica]) -> FastAPI:
    """All routes; ``replica`` is called for every request and gives who answers it."""
    api = FastAPI(title="banjoray", description="Answers of one registered model version, in several protocols.")
    api.add_exception_handler(RequestError, _refuse)
    api.add_exception_handler(HTTPException, _not_found)
    for protocol in (huggingface, openai, kserve, tei):
        api.include_router(protocol.routes(replica))
    api.include_router(_about(replica))
    return api


def refusal(request: Request, message: str, status: int) -> JSONResponse:
    """An error in the shape of the protocol that the request's path belongs to."""
    # What is told may repeat half a character of the request, which no answer can hold.
    message = message.encode(errors="backslashreplace").decode()
    path = request.scope["path"].removeprefix(request.scope.get("root_path", "").rstrip("/"))
    for protocol in _SHAPED:
        if any(path == known or (known.endswith("/") and path.startswith(known)) for known in protocol.PATHS):
            return protocol.refusal(message, status)
    return huggingface.refusal(message, status)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return refusal(request, error.message, error.status)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(request, f"{request.method} {request.url.path}: {error.detail}", error.status_code)


def _about(replica: Callable[[], Replica]) -> APIRouter:
    """``GET /`` and ``GET /healthz``."""
    router = APIRouter()

    @router.get("/healthz", summary="Ready to answer")
    async def healthz() -> dict[str, str]:
        """Answers once the model is loaded and has made its first pass."""
        return {"status": "ok"}

    @router.get("/", summary="What answers here")
    async def about() -> Response:
        """The model's name, version, task and labels, the run it came from, and which engine answers and why."""
        found = replica()
        version = found.version
        told = {
            "model": version.model,
            "version": version.version,
            "task": version.task,
            "labels": version.labels,
            "metrics": dict(version.metrics),
            "lineage": dict(version.lineage),
            "engine": found.chosen.to_json(),
        }
        return JSONResponse(told, headers=found.headers)

    return router
