"""HTTP answers from a registered version: one Ray Serve deployment, ingress and model in the same replica."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema
from starlette.exceptions import HTTPException

import ray
from banjoray.config.job import is_url, read_yaml
from banjoray.config.section import validate
from banjoray.config.serve import ServeConfig
from banjoray.data.tokens import Feature
from banjoray.errors import ClusterError, ConfigError, RequestError
from banjoray.registry import Registry
from banjoray.serving.batching import Batcher
from banjoray.serving.engine import load
from banjoray.serving.limits import Bounded, Entry, Queue
from banjoray.serving.protocols import huggingface
from banjoray.serving.security import NONE, Keyed, Keys, settled_keys
from banjoray.serving.streaming import EventStream
from banjoray.serving.telemetry import Observed, Telemetry
from banjoray.training.signals import kept_sigterm
from ray import serve

api = FastAPI(title="banjoray", description="Answers of one registered model version.")

# Which shapes there are depends on the task; GET / names it.
_INPUTS = (
    "A text, a list of texts, or objects: text and text_pair, question and context, source_sentence and sentences."
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
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}}
_DOCUMENTED: dict[str, Any] = {
    "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": _BODY}}}},
    "responses": {
        200: {
            "description": "As Hugging Face's client reads the task; with stream: true events, an error the last.",
            "content": {"application/json": {}, "text/event-stream": {"schema": {"type": "string"}}},
        }
    }
    | {
        status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for status, text in {
            400: "Not JSON.",
            401: "No known key.",
            404: "Another model.",
            408: "The body stopped half way.",
            413: "Too large.",
            422: "Wrong shape.",
            429: "Too many rows wait; Retry-After says for how long.",
            504: "No answer in time.",
        }.items()
    },
}


def _replica() -> Any:
    """The endpoint of this process."""
    return serve.get_replica_context().servable_object


# The last one added is the outermost.
api.add_middleware(Bounded, timeout_s=lambda: float(_replica().timeout_s))
api.add_middleware(Keyed, keys=lambda: _replica().keys)
api.add_middleware(Observed, telemetry=lambda: _replica().telemetry)


@api.exception_handler(RequestError)
async def _refuse(_: Request, error: RequestError) -> JSONResponse:
    return JSONResponse({"error": error.message}, error.status, error.headers)


@api.exception_handler(HTTPException)
async def _not_found(request: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse({"error": f"{request.method} {request.url.path}: {error.detail}"}, error.status_code)


# serve.ingress pickles the routes with the names they use, so what they use stands above them.
async def _body(request: Request, limit: int) -> bytes:
    """The request's body; refused as soon as it is known to be too large."""
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


@serve.deployment(name="Endpoint")
@serve.ingress(api)
class Endpoint:
    """One replica: reads a request, encodes its rows, waits for its share of a batch, answers."""

    def __init__(self, config: ServeConfig, version: str) -> None:
        self._config = config
        self._engine = load(version, config.registry)
        self.timeout_s = config.timeout_s
        self.keys = None if config.api_keys in (None, NONE) else Keys(config.api_keys)
        self.telemetry = Telemetry(config, serve.get_replica_context().replica_id.unique_id, self._told)
        self._queue: Queue[Feature, np.ndarray] = Queue(config, self.telemetry)
        self._batcher: Batcher[Entry[Feature], np.ndarray] = Batcher(
            self._queue.timed(self._forward), config.max_batch_tokens
        )
        registered = self._engine.version
        self._headers = {"x-model-version": str(registered), "x-run-id": str(registered.lineage["run"])}

    def _told(self) -> dict[str, str]:
        """What answers now, for metrics and the log."""
        version = self._engine.version
        return {"model": version.model, "version": str(version), "run": str(version.lineage["run"])}

    def _forward(self, rows: Any) -> list[np.ndarray]:
        return self._engine.forward(rows)

    @api.post("/", summary="Answer rows", **_DOCUMENTED)
    async def answer(self, request: Request) -> Response:
        """Hugging Face's inference schema for the task that the model was trained for."""
        engine = self._engine
        body = await _body(request, int(self._config.max_body_mib * 2**20))
        ask = huggingface.parse(body, engine.task, self._config.max_rows)
        rows = await self._queue.encoded(lambda rows: asyncio.to_thread(engine.encode, rows), ask.rows)
        if ask.stream:
            pieces = self._queue.stream(self._batcher.stream(engine.streamed(ask, rows)))
            return EventStream(huggingface.events(pieces), self._headers)
        outputs = await self._queue.outputs(self._batcher, [feature for row in rows for feature in row])
        return JSONResponse(engine.answer(ask, rows, outputs), headers=self._headers)

    @api.post("/models/{name}", summary="Answer rows, by the model's name", **_DOCUMENTED)
    async def answer_model(self, name: str, request: Request) -> Response:
        """The same as ``POST /``, at the path that `huggingface_hub.InferenceClient` uses."""
        served = self._engine.version.model
        if name != served:
            raise RequestError(f"no model '{name}' here; this endpoint serves '{served}'", 404)
        return await self.answer(request)

    @api.get("/healthz", summary="Ready to answer")
    async def healthz(self) -> dict[str, str]:
        """Answers once the model is loaded and has made its first pass."""
        return {"status": "ok"}

    @api.get("/metrics", summary="Metrics of this replica", response_class=PlainTextResponse)
    async def metrics(self) -> Response:
        """Prometheus' text format; every series names the replica that answered."""
        return PlainTextResponse(self.telemetry.exposition())

    @api.get("/", summary="What answers here")
    async def about(self) -> Response:
        """The model's name, version, task and labels, and the run it came from."""
        version = self._engine.version
        told = {
            "model": version.model,
            "version": version.version,
            "task": version.task,
            "labels": version.labels,
            "metrics": dict(version.metrics),
            "lineage": dict(version.lineage),
        }
        return JSONResponse(told, headers=self._headers)


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application of a serve config's ``args``; Serve calls it.

    An alias is resolved here, once, so that replicas that start later serve the same version.
    Which host the cluster listens on is not known here, so ``api_keys`` has to be said.
    Raises ConfigError, RegistryError.
    """
    config = validate(ServeConfig, args, "args")
    settled_keys(config.api_keys, "this cluster", "args")
    version = Registry(config.registry).resolve(config.model)
    application: serve.Application = Endpoint.bind(config, str(version))  # type: ignore[attr-defined]
    return application


@contextmanager
def serving(file: str | Path, port: int | None, say: Callable[[str], None]) -> Iterator[str]:
    """A serve config's applications on this machine while the block runs; the address they answer at.

    Listens on 127.0.0.1 unless the file names a host. Starts a Ray of its own and stops it at the end.
    Raises ConfigError: a wrong file, a port in use; ClusterError: an application that does not come up.
    """
    config = read_config(file, port)
    host, number = config.http_options.host, config.http_options.port
    _check_port(host, number)
    say(f"starting {', '.join(application.name for application in config.applications)}")
    # "Started Serve in namespace ..." is for Serve's log file.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    started = not ray.is_initialized()
    if started:
        with kept_sigterm():
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        # What `serve run FILE` does: the config goes to Serve's controller as it is.
        serve.start(proxy_location=config.proxy_location, http_options=config.http_options.model_dump())
        client: Any = serve.context._get_global_client()  # noqa: SLF001
        client.deploy_apps(config, _blocking=False)
        _wait_until_running([application.name for application in config.applications])
        yield f"http://{host}:{number}"
    finally:
        serve.shutdown()
        if started:
            ray.shutdown()


def read_config(file: str | Path, port: int | None) -> ServeDeploySchema:
    """A serve config, checked down to the arguments of `build`, with what `banjoray serve` sets itself."""
    tree = read_yaml(file)
    if not isinstance(tree.get("applications"), list) or not all(isinstance(a, dict) for a in tree["applications"]):
        raise ConfigError(f"{file}: no list of 'applications'; needed a Ray Serve config (a job file goes to train)")
    if not isinstance(tree.get("http_options") or {}, dict):
        raise ConfigError(f"{file}: http_options: found {tree['http_options']!r}, needed keys and values")
    http = {"host": "127.0.0.1"} | (tree.get("http_options") or {}) | ({"port": port} if port else {})
    for application in tree["applications"]:
        if application.get("import_path") != "banjoray.serving.app:build":
            continue
        args = validate(ServeConfig, application.get("args") or {}, f"{file}: args")
        registry = args.registry if is_url(args.registry) else str(Path(args.registry).expanduser().absolute())
        Registry(registry).resolve(args.model)
        keys = settled_keys(args.api_keys, str(http["host"]), f"{file}: args")
        application["args"] = args.model_dump() | {"registry": registry, "api_keys": keys}
    try:
        return ServeDeploySchema.model_validate(tree | {"http_options": http})
    except ValidationError as error:
        found = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ConfigError(f"{file}: not a Ray Serve config: {'; '.join(found)}") from None


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{host}:{port} can't be used ({error.strerror}); stop what listens there, or give --port"
            ) from None


def _wait_until_running(names: list[str], timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = {name: serve.status().applications.get(name) for name in names}
        states = {name: status.status if status else "NOT_STARTED" for name, status in found.items()}
        if all(state == "RUNNING" for state in states.values()):
            return
        for name, status in found.items():
            if status is not None and states[name] in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise ClusterError(f"application {name} did not start: {_reason(status)}")
        time.sleep(0.2)
    raise ClusterError(f"applications are not running after {timeout_s:g} s: {states}")


def _reason(status: Any) -> str:
    """The line of Serve's message that says most."""
    messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line]
    return str((telling or lines or ["Serve gives no reason"])[-1])
