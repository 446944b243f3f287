"""What an endpoint tells about itself: metrics, a log line per request, and times in the answer. Plain ASGI: no Ray.

Lines and metrics hold no text of a request, unless ``log_texts`` is on.
"""

import asyncio
import json
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from banjoray.config.serve import ServeConfig

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
CLIENT_GONE = 499
# Of a request that no version answered: for a page, or refused.
NO_VERSION = "none"
Refuse = Callable[[Scope, str, int, Mapping[str, str]], Response]
"""An error for whoever sent a request, as its protocol has it: scope, message, status, headers."""
_KINDS = {
    400: "not_json",
    401: "no_key",
    404: "not_found",
    405: "not_found",
    408: "slow_client",
    413: "too_large",
    422: "wrong_shape",
    429: "overloaded",
    CLIENT_GONE: "client_gone",
    504: "deadline",
}
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


@dataclass
class Record:
    """What is known of a request; times in seconds."""

    id: str
    began: float = field(default_factory=time.perf_counter)
    status: int = 0
    rows: int = 0
    tokens: int = 0
    encode_s: float | None = None
    queue_s: float | None = None
    forward_s: float | None = None
    texts: Sequence[Any] | None = None
    version: str | None = None

    def server_timing(self) -> str:
        """The value of the header Server-Timing, in milliseconds."""
        parts = {"encode": self.encode_s, "queue": self.queue_s, "forward": self.forward_s}
        parts["total"] = time.perf_counter() - self.began
        return ", ".join(f"{name};dur={took * 1000:.1f}" for name, took in parts.items() if took is not None)


_CURRENT: ContextVar[Record | None] = ContextVar("banjoray_request", default=None)


def current() -> Record:
    """The record of the request that is answered here; one that nobody reads, outside of any."""
    return _CURRENT.get() or Record("")


class _Labelled:
    """A registry whose every sample has some more labels."""

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        self._registry = registry
        self._labels = dict(labels)

    def collect(self) -> Iterable[Metric]:
        """All metrics, as they are now."""
        for metric in self._registry.collect():
            metric.samples = [sample._replace(labels=sample.labels | self._labels) for sample in metric.samples]
            yield metric


def _to_stderr(line: str) -> None:
    """A line on the process's own stderr; nowhere, where a full disk takes none: requests are answered all the same.

    In a replica ``sys.stderr`` and ``print`` are Serve's: they put words of theirs around a line, which is no JSON
    then.
    """
    assert sys.__stderr__ is not None
    with suppress(OSError):
        sys.__stderr__.write(f"{line}\n")
        sys.__stderr__.flush()


class Telemetry:
    """The metrics and the log of one replica.

    ``versions`` tells what is held now, each a model, version, run and role. ``write`` takes a line of the log.
    """

    def __init__(
        self,
        config: ServeConfig,
        replica: str,
        versions: Callable[[], Iterable[Mapping[str, str]]],
        write: Callable[[str], None] = _to_stderr,
    ) -> None:
        self.log_texts = config.log_texts
        self._access_log = config.access_log
        self._versions = versions
        self._write = write
        self._registry = CollectorRegistry()
        self._labelled = _Labelled(self._registry, {"replica": replica})
        self._registry.register(self)
        self._requests = Counter(
            "banjoray_requests", "Requests.", ("route", "status", "version"), registry=self._registry
        )
        self._errors = Counter("banjoray_errors", "Requests that failed.", ("kind",), registry=self._registry)
        self._request = Histogram(
            "banjoray_request_seconds", "End to end.", ("route", "version"), buckets=SECONDS, registry=self._registry
        )
        self._encode = self._histogram("banjoray_encode_seconds", "Tokenising a request.", SECONDS)
        self._queue = self._histogram("banjoray_queue_seconds", "Wait of a request for its first batch.", SECONDS)
        self._forward = self._histogram("banjoray_forward_seconds", "A batch's pass through the model.", SECONDS)
        self._batch_rows = self._histogram("banjoray_batch_rows", "Rows of a batch.", ROWS)
        self._batch_tokens = self._histogram("banjoray_batch_tokens", "Tokens of a batch, padding included.", TOKENS)
        self._padding = self._histogram("banjoray_batch_padding_share", "Share of padding in a batch.", SHARES)
        self._shadow = Counter(
            "banjoray_shadow_rows", "Rows compared.", ("version", "label", "same"), registry=self._registry
        )
        self._queued = Gauge("banjoray_queued_rows", "Rows taken and not answered.", registry=self._registry)

    def _histogram(self, name: str, told: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, told, buckets=buckets, registry=self._registry)

    def collect(self) -> Iterator[Metric]:
        """The metric that says which versions are held, and as what."""
        found = InfoMetricFamily("banjoray_model", "A version that is held.", labels=["role"])
        for version in self._versions():
            told = dict(version)
            found.add_metric([told.pop("role")], told)
        yield found

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format, each with the replica's name."""
        return generate_latest(self._labelled)

    def batch(self, lengths: Sequence[int], seconds: float) -> None:
        """Note a forward pass over rows of these lengths in tokens."""
        padded = max(lengths, default=0) * len(lengths)
        self._forward.observe(seconds)
        self._batch_rows.observe(len(lengths))
        self._batch_tokens.observe(padded)
        self._padding.observe(1 - sum(lengths) / padded if padded else 0.0)

    def queued(self, rows: int) -> None:
        """Note how many rows are taken and not answered."""
        self._queued.set(rows)

    def finished(self, record: Record, scope: Scope) -> None:
        """Note the end of a request, whatever came of it."""
        route = getattr(scope.get("route"), "path", "none")
        seconds = time.perf_counter() - record.began
        version = record.version or NO_VERSION
        self._requests.labels(route, str(record.status), version).inc()
        self._request.labels(route, version).observe(seconds)
        if record.encode_s is not None:
            self._encode.observe(record.encode_s)
        if record.queue_s is not None:
            self._queue.observe(record.queue_s)
        kind = _KINDS.get(record.status, "internal" if record.status >= 500 else "other")
        if record.status >= 400:
            self._errors.labels(kind).inc()
        if self._access_log and route != "/healthz":
            self._log(record, route, seconds, scope.get("banjoray.key"), kind if record.status >= 400 else None)

    def _log(self, record: Record, route: str, seconds: float, key: str | None, kind: str | None) -> None:
        told = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": record.id,
            # The path may hold anything; the route is ours.
            "route": route,
            "status": record.status,
            "ms": round(seconds * 1000, 1),
            "rows": record.rows,
            "tokens": record.tokens,
        }
        more = {"version": record.version, "key": key, "error": kind, "texts": record.texts if self.log_texts else None}
        self._write(json.dumps(told | {name: value for name, value in more.items() if value is not None}, default=str))

    def failed(self, record: Record, error: BaseException) -> None:
        """Note a bug of ours: where it happened, and what it says only if texts may be logged."""
        self._broken({"request_id": record.id}, error)

    def broken(self, where: str, error: BaseException) -> None:
        """Note what went wrong outside of any request, in the same way."""
        self._broken({"where": where}, error)

    def told(self, where: str, what: str) -> None:
        """Note something that whoever runs the endpoint should know."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._write(json.dumps({"time": now, "level": "warning", "where": where, "message": what}))

    def shadowed(self, version: str, label: str, same: bool) -> None:
        """Note a row that a shadow was compared on, under the label that the answering version gave it."""
        self._shadow.labels(version, label, "yes" if same else "no").inc()

    def _broken(self, where: Mapping[str, str], error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        told = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **where,
            "level": "error",
            "exception": type(error).__name__,
            "at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
        }
        self._write(json.dumps(told | ({"message": str(error)} if self.log_texts else {})))


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> tuple[str, bool]:
    """The id that a request came with, if that is a plain word, else a new one; and whether it is new."""
    given = next((value for name, value in headers if name.lower() == b"x-request-id"), b"")
    return (given.decode("ascii"), False) if _SANE_ID.fullmatch(given) else (uuid.uuid4().hex, True)


def _broken(record: Record, error: Exception) -> str:
    """What is said where there is a bug; raises it again if another answer has begun."""
    if record.status:
        raise error
    return f"something went wrong here; the log says what, at request {record.id}"


class Observed:
    """ASGI middleware that times, counts and logs every request, and answers 500 where there is a bug.

    ``telemetry`` gives that of the replica.
    """

    def __init__(self, app: ASGIApp, telemetry: Callable[[], Telemetry], refuse: Refuse) -> None:
        self._app = app
        self._telemetry = telemetry
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        telemetry = self._telemetry()
        name, new = request_id(scope["headers"])
        record = Record(name)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                added = [(b"server-timing", record.server_timing().encode())]
                added += [(b"x-tokens", str(record.tokens).encode())] if record.tokens else []
                # Serve gives every request an id and sends it back by itself; a second header would double it.
                added += [(b"x-request-id", record.id.encode())] if new else []
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        token = _CURRENT.set(record)
        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:
            record.status = record.status or CLIENT_GONE
            raise
        except Exception as error:  # noqa: BLE001  the boundary between requests: this one fails, the rest go on
            telemetry.failed(record, error)
            await self._refuse(scope, _broken(record, error), 500, {})(scope, receive, sending)
        finally:
            _CURRENT.reset(token)
            telemetry.finished(record, scope)
