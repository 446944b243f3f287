"""The HTTP application of a replica: what it says of itself, and every protocol's routes. Knows nothing of Ray."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from banjoray.errors import RequestError
from banjoray.serving.limits import Admitted, Bounded
from banjoray.serving.playground import page
from banjoray.serving.protocols import huggingface, kserve, openai, tei
from banjoray.serving.protocols.bodies import refusals
from banjoray.serving.replica import Replica, Slot
from banjoray.serving.security import Keyed
from banjoray.serving.telemetry import Observed


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
    api.include_router(page.routes(replica))
    # The last one added is the outermost.
    api.add_middleware(Bounded, timeout_s=lambda: replica().limits.timeout_s, refuse=refusal)
    api.add_middleware(Admitted, check=lambda: replica().check_wait(), refuse=refusal)
    api.add_middleware(Keyed, keys=lambda: replica().keys, refuse=refusal)
    api.add_middleware(Observed, telemetry=lambda: replica().telemetry, refuse=refusal)
    return api


def refusal(scope: Scope, message: str, status: int, headers: Mapping[str, str]) -> Response:
    """An error in the shape of the protocol that a request's path belongs to."""
    path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
    shape = next((protocol.refusal for protocol in _SHAPED if _belongs(path, protocol.PATHS)), huggingface.refusal)
    response = shape(message, status)
    response.headers.update(headers)
    return response


def _belongs(path: str, paths: Sequence[str]) -> bool:
    return any(path == known or (known.endswith("/") and path.startswith(known)) for known in paths)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return refusal(request.scope, error.message, error.status, error.headers or {})


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = RequestError(f"{request.method} {request.url.path}: {error.detail}", error.status_code).message
    return refusal(request.scope, told, error.status_code, error.headers or {})


def _about(replica: Callable[[], Replica]) -> APIRouter:
    """``GET /``, ``GET /healthz`` and ``GET /metrics``."""
    router = APIRouter()

    @router.get("/healthz", summary="Ready to answer")
    async def healthz() -> dict[str, str]:
        """Answers once the model is loaded and has made its first pass."""
        return {"status": "ok"}

    @router.get("/metrics", summary="Metrics of this replica", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format; every series names the replica that answered."""
        return PlainTextResponse(replica().telemetry.exposition())

    @router.get("/", summary="What answers here")
    async def about() -> Response:
        """The model's name, version, task and labels, the run it came from, and which engine answers and why.

        Of several models an object of the key "models", a list of those.
        """
        slots = replica().slots
        told = [_told(slots[name]) for name in sorted(slots)]
        if len(told) > 1:
            return JSONResponse({"models": told})
        (slot,) = slots.values()
        return JSONResponse(told[0], headers=slot.production.headers)

    @router.get("/models/{name}", summary="What answers for a model", responses=refusals(huggingface.ERROR))
    async def about_model(name: str) -> Response:
        """The same of one model, by its name."""
        found = replica().pick(name)
        return JSONResponse(_told(replica().slots[found.version.model]), headers=found.headers)

    return router


def _told(slot: Slot) -> dict[str, Any]:
    """What answers for a model, and what else is held for it."""
    found = slot.production
    version = found.version
    rollout = {
        **slot.held,
        **({"shadow": slot.shadow.to_json()} if slot.shadow else {}),
        **({"refused": slot.refused} if slot.refused else {}),
    }
    return {
        "model": version.model,
        "version": version.version,
        "task": version.task,
        "labels": version.labels,
        "metrics": dict(version.metrics),
        "lineage": dict(version.lineage),
        "engine": found.chosen.to_json(),
        "shares": found.shares(),
        "rollout": rollout,
    }
