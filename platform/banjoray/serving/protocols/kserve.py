"""KServe's Open Inference Protocol (v2) over HTTP, with binary tensors, as `tritonclient.http` sends and reads it.

A row is an element of the tensor ``text`` (with ``text_pair`` for pairs), or of ``question`` and ``context``. What is
answered depends on the task: ``label`` and ``score``, with ``scores`` of all labels in their order; ``embedding``; or
``answer``, which holds a row's answer as JSON.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from banjoray import __version__
from banjoray.data.bad_rows import half_a_character
from banjoray.errors import RequestError
from banjoray.serving.protocols.bodies import asked, body_of, documented, json_object, refusals
from banjoray.serving.protocols.tensors import Tensor, header_length, packed, read_tensors
from banjoray.serving.replica import Replica
from banjoray.serving.served import Served
from banjoray.tasks.task import Task, true_or_false

PATHS: tuple[str, ...] = ("/v2", "/v2/")
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}}
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string", "example": "text"},
        "shape": {"type": "array", "items": {"type": "integer"}, "example": [1]},
        "datatype": {"enum": ["BYTES"]},
        "data": {"type": "array", "example": ["what a lovely surprise"]},
        "parameters": {"type": "object"},
    },
}
_INFER = documented(
    {
        "id": {"type": "string"},
        "inputs": {"type": "array", "items": _TENSOR, "minItems": 1},
        "outputs": {"type": "array", "items": {"type": "object"}, "description": "Those that are wanted; or all."},
        "parameters": {"type": "object", "description": "As the task has them; and binary_data_output."},
    },
    ["inputs"],
    "Tensors; with binary data after the JSON where that is wanted.",
    _ERROR,
)
_INFER["openapi_extra"]["requestBody"]["content"] |= {"application/octet-stream": {}}
_INFER["responses"][200]["content"] |= {"application/octet-stream": {}}
_LENGTH = {"description": "Bytes of JSON before binary data.", "schema": {"type": "integer"}}
_INFER["responses"][200]["headers"] = {"Inference-Header-Content-Length": _LENGTH}
_REFUSALS = refusals(_ERROR)


def routes(replica: Callable[[], Replica]) -> APIRouter:
    """``/v2`` and everything under it."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
    _add_server(router)

    @router.get("/models/{name}", summary="What a model reads and answers", responses=_REFUSALS)
    async def model(name: str) -> Response:
        """Its tensors."""
        return _about(_picked(replica(), name, None))

    @router.get("/models/{name}/versions/{version}", summary="The same of a version", responses=_REFUSALS)
    async def model_version(name: str, version: str) -> Response:
        """Its tensors."""
        return _about(_picked(replica(), name, version))

    @router.get("/models/{name}/ready", summary="Whether a model answers", responses=_REFUSALS)
    async def ready(name: str) -> Response:
        """200 if it does."""
        return _ready(_picked(replica(), name, None))

    @router.get("/models/{name}/versions/{version}/ready", summary="The same of a version", responses=_REFUSALS)
    async def version_ready(name: str, version: str) -> Response:
        """200 if it does."""
        return _ready(_picked(replica(), name, version))

    @router.post("/models/{name}/infer", summary="Answer tensors", **_INFER)
    async def infer(name: str, request: Request) -> Response:
        """By the version that this endpoint serves."""
        return await _infer(_picked(replica(), name, None), request)

    @router.post("/models/{name}/versions/{version}/infer", summary="The same, by a version", **_INFER)
    async def infer_version(name: str, version: str, request: Request) -> Response:
        """If it is the one that this endpoint serves."""
        return await _infer(_picked(replica(), name, version), request)

    return router


def refusal(message: str, status: int) -> JSONResponse:
    """An error as KServe's clients read it; a wrong shape is 400 for them."""
    return JSONResponse({"error": message}, 400 if status == 422 else status)


def _add_server(router: APIRouter) -> None:
    @router.get("", summary="What this server is")
    async def server() -> Response:
        """Its name, version and extensions of the protocol."""
        told = {"name": "banjoray", "version": __version__, "extensions": ["binary_tensor_data"]}
        return JSONResponse(told)

    @router.get("/health/live", summary="Whether the server runs")
    async def live() -> dict[str, bool]:
        """It does."""
        return {"live": True}

    @router.get("/health/ready", summary="Whether the model is loaded")
    async def ready() -> dict[str, bool]:
        """It is: a replica that has not loaded it gets no requests."""
        return {"ready": True}


def _picked(replica: Replica, name: str, version: str | None) -> Served:
    return replica.pick(name if version is None else f"{name}@{version}")


def _ready(served: Served) -> Response:
    return JSONResponse({"name": served.version.model, "ready": True}, headers=served.headers)


def _about(served: Served) -> Response:
    inputs = [key for key in _reads(served.task) if key != "text_pair"]
    told = {
        "name": served.version.model,
        "versions": [str(served.version.version)],
        "platform": "banjoray",
        "inputs": [{"name": key, "datatype": "BYTES", "shape": [-1]} for key in inputs],
        "outputs": [
            {"name": key, "datatype": "BYTES" if key in ("label", "answer") else "FP32", "shape": shape}
            for key, shape in _writes(served).items()
        ],
    }
    return JSONResponse(told, headers=served.headers)


def _reads(task: Task) -> tuple[str, ...]:
    match task.name:
        case "question-answering":
            return ("question", "context")
        case "text-classification":
            return ("text", "text_pair")
    return ("text",)


def _writes(served: Served) -> dict[str, list[int]]:
    """Output -> its shape, -1 for what depends on the request or the model."""
    match served.task.name:
        case "text-classification":
            return {"label": [-1], "score": [-1], "scores": [-1, max(1, len(served.labels))]}
        case "feature-extraction":
            return {"embedding": [-1, -1]}
    return {"answer": [-1]}


async def _infer(served: Served, request: Request) -> Response:
    whole = await body_of(request, served.limits)
    length = header_length(request.headers.get("inference-header-content-length"), len(whole))
    body = json_object(whole[:length], '{"inputs": [...]}')
    ident = body.get("id")
    if ident is not None and (not isinstance(ident, str) or half_a_character(ident)):
        raise RequestError(f"id: found {ident!r:.100}; needed text")
    parameters = body.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise RequestError(f"parameters: found {type(parameters).__name__}; needed an object")
    binary = true_or_false(parameters, "binary_data_output", False)
    own = {key: value for key, value in parameters.items() if key != "binary_data_output"}
    wanted = _wanted(body.get("outputs"), list(_writes(served)), binary)
    rows = _rows(read_tensors(body.get("inputs"), whole[length:], served.limits.max_rows), served.task)
    if served.task.name == "text-classification" and "top_k" in own:
        raise RequestError("parameters.top_k: is not known here; label is the best, and scores has all of them")
    ask = asked(rows, own, served.task, served.limits.max_rows)
    if ask.stream:
        raise RequestError("parameters.stream: found true; whole answers are sent here, leave it out")
    found = _outputs(served, (await served.answer(ask)).body)
    version = served.version
    head: dict[str, Any] = {"model_name": version.model, "model_version": str(version.version)} | (
        {"id": ident} if ident else {}
    )
    return packed(head, {key: (found[key], form) for key, form in wanted.items()}, served.headers)


def _rows(tensors: Mapping[str, Sequence[str]], task: Task) -> list[Any]:
    """The rows of some tensors in the task's words."""
    known = _reads(task)
    missing = [key for key in known if key not in tensors and key != "text_pair"]
    if missing or set(tensors) - set(known):
        raise RequestError(f"inputs: found {sorted(tensors)!r:.200}; this model reads {' and '.join(known)}")
    if len({len(cells) for cells in tensors.values()}) > 1:
        raise RequestError("inputs: found tensors of unlike lengths; needed an element per row in each")
    rows = [dict(zip(tensors, cells, strict=True)) for cells in zip(*tensors.values(), strict=True)]
    return [task.inputs(row) for row in rows]


def _wanted(found: Any, known: Sequence[str], binary: bool) -> dict[str, bool]:
    """Output -> whether it is wanted as binary data, in the order of the answer."""
    if found is None or found == []:
        return dict.fromkeys(known, binary)
    wanted: dict[str, bool] = {}
    if not isinstance(found, list):
        raise RequestError(f"outputs: found {type(found).__name__}; needed a list of outputs")
    for place, output in enumerate(found):
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str) or name not in known:
            raise RequestError(f"outputs[{place}]: found {name!r:.100}; this model has {', '.join(known)}")
        parameters = output.get("parameters") or {}
        if not isinstance(parameters, dict) or set(parameters) - {"binary_data"}:
            raise RequestError(f"outputs[{place}].parameters: found {parameters!r:.100}; only binary_data is known")
        wanted[name] = true_or_false(parameters, "binary_data", binary)
    return wanted


def _outputs(served: Served, answers: list[Any]) -> dict[str, Tensor]:
    """The output tensors of the answers of all rows."""
    match served.task.name:
        case "text-classification":
            labels = list(served.labels) or [answers[0][0]["label"]]
            tables = [{entry["label"]: entry["score"] for entry in row} for row in answers]
            return {
                "label": [row[0]["label"] for row in answers],
                "score": np.array([row[0]["score"] for row in answers], dtype="<f4"),
                "scores": np.array([[table[label] for label in labels] for table in tables], dtype="<f4"),
            }
        case "feature-extraction":
            return {"embedding": np.array(answers, dtype="<f4")}
    return {"answer": [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in answers]}
