"""``GET /ui``: the playground. It asks the endpoint that it comes from, as any other client does."""

from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from banjoray.serving.replica import Replica
from banjoray.serving.security import PAGE

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_ENTRANCE = "index.html"
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    # Text can't become HTML: assigning to innerHTML raises.
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
# Read once, when the module is: a replica answers with them from memory.
_FILES = {file.name: file.read_bytes() for file in Path(__file__).parent.iterdir() if file.suffix in _TYPES}


def routes(replica: Callable[[], Replica]) -> APIRouter:
    """``GET /ui``, its files below it, and what it has to know of the model. Not in the OpenAPI document."""
    router = APIRouter(include_in_schema=False)

    @router.get(PAGE)
    async def entrance() -> Response:
        _check_open(replica())
        return _file(_ENTRANCE)

    @router.get(f"{PAGE}/about")
    async def about(model: str | None = None) -> Response:
        _check_open(replica())
        found = replica().pick(model)
        task = found.task
        told = {
            "task": task.name,
            "problem_type": task.problem_type,
            "cells": list(found.cells),
            "mask": found.tokenizer.mask_token if task.name == "fill-mask" else None,
            "keys": replica().keys is not None,
        }
        return JSONResponse(told, headers=HEADERS)

    @router.get(PAGE + "/{name}")
    async def file(name: str) -> Response:
        _check_open(replica())
        return _file(name)

    return router


def _check_open(replica: Replica) -> None:
    if not replica.limits.playground:
        raise HTTPException(404, "the playground is off (playground: false)")


def _file(name: str) -> Response:
    """One of the page's files; raises HTTPException 404: none of them."""
    if name not in _FILES:
        raise HTTPException(404)
    return Response(_FILES[name], headers=HEADERS | {"content-type": _TYPES[Path(name).suffix]})
