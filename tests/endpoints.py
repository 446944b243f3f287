"""An endpoint in the process of a test: the application, around an engine that was not trained; no Ray and no port."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from banjoray.config.job import load_job
from banjoray.config.section import validate
from banjoray.config.serve import ServeConfig
from banjoray.data.tokens import Feature
from banjoray.registry import ModelVersion
from banjoray.serving.costs import FREE, Cost
from banjoray.serving.engine import Engine
from banjoray.serving.replica import Replica, Slot
from banjoray.training.preflight import prepare


def version(task: str, labels: Sequence[str] = ()) -> ModelVersion:
    """A version that no registry holds."""
    lineage: Any = {"run": "first"}
    return ModelVersion("tiny", 1, task, tuple(labels), {}, lineage, {}, "2026-01-02T03:04:05+00:00", "0" * 64, "-")


def untrained(job_file: Path, folder: Path) -> Engine:
    """An engine around the base of a job that ships, as it is before its first step."""
    job = load_job(job_file, [f"storage={folder}"])
    ready = prepare(job)
    model, tokenizer = ready.start.model().eval(), ready.start.tokenizer
    task = ready.task.for_config(model.config).for_tokenizer(tokenizer)
    return Engine(version(job.task), task, model, tokenizer, job)


class Plain:
    """An engine of one label whose forward pass can be held up or broken."""

    def __init__(self) -> None:
        from banjoray.tasks.text_classification import TextClassification

        self.version = version("text-classification", ["yes"])
        self.task = TextClassification()
        self.model: Any = None
        self.rows: list[int] = []
        self.hold: Any = None
        self.error: Exception | None = None

    def cost(self) -> Cost:
        """Nothing that counts."""
        return FREE

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Feature]]:
        """A token per word."""
        return [[Feature({"input_ids": list(range(len(row["text"].split())))})] for row in rows]

    def forward(self, features: Sequence[Feature]) -> list[np.ndarray]:
        """One logit per row, once nothing holds it up."""
        if self.hold is not None:
            assert self.hold.wait(60)
        if self.error is not None:
            raise self.error
        self.rows.append(len(features))
        return [np.ones(1, dtype=np.float32) for _ in features]

    def answer(self, ask: Any, rows: Any, outputs: Any) -> Any:
        """What the task answers."""
        from banjoray.tasks.task import Seen

        return self.task.answer(ask, [Seen([], [output]) for output in outputs], ("yes",), None)


def endpoint(patch: pytest.MonkeyPatch, engine: Any, **args: Any) -> Replica:
    """The replica that `client` talks to, with these arguments, around ``engine``."""
    config = validate(ServeConfig, {"model": "tiny@1"} | args, "args")
    replica = Replica(config, "r1")
    replica.slots["tiny"] = Slot(replica.serve(engine))
    context = SimpleNamespace(servable_object=SimpleNamespace(replica=replica))
    patch.setattr("ray.serve.get_replica_context", lambda: context)
    return replica


@asynccontextmanager
async def client(**kwargs: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application in this process."""
    import banjoray.serving.app as app

    transport = httpx.ASGITransport(app=app.api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://here", **kwargs) as found:
        yield found
