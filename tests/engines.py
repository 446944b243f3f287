"""From a job to a served version without Ray: trained here, exported, registered, loaded and asked."""

import json
from pathlib import Path
from typing import Any

import pytest

from banjoray.config.job import JobConfig
from banjoray.registry import ModelVersion, Registry
from banjoray.serving.engine import Engine, load
from banjoray.serving.protocols import huggingface
from banjoray.training.checkpoints import Store
from banjoray.training.export import export
from banjoray.training.interface import Callbacks
from banjoray.training.loop import fit
from banjoray.training.preflight import prepare
from banjoray.training.registering import gate_and_register
from banjoray.training.scoring import score_folder


def registered(job: JobConfig) -> ModelVersion:
    """Train the job in this process and register its best checkpoint, past the gate and scored afresh."""
    ready, run = prepare(job), f"{job.storage}/run"
    result = fit(job, ready.rows, ready.task, ready.start, run, Callbacks())
    folder = Path(run) / "model"
    files = Store(run, print).local(result.checkpoint)
    export(job, ready.start.model(), ready.start.tokenizer, result.checkpoint, files, folder)
    origin = {"run": "run", "trial": None}
    return gate_and_register(job, ready, folder, result, origin, lambda at: score_folder(at, job, "validation")[0])


def folder_of(job: JobConfig, version: ModelVersion) -> Path:
    """The files of a registered version."""
    return Registry(job.registry.root).fetch(version)


def engine_of(job: JobConfig, version: ModelVersion) -> Engine:
    """The engine that serves a version."""
    return load(str(version), job.registry.root)


def ask(engine: Engine, request: dict[str, Any], together: bool = True) -> Any:
    """The body of the answer to a request's body; every feature in one forward pass, or each alone."""
    asked = huggingface.parse(json.dumps(request).encode(), engine.task, 1000)
    rows = engine.encode(asked.rows)
    features = [feature for row in rows for feature in row]
    outputs = engine.forward(features) if together else [engine.forward([feature])[0] for feature in features]
    return json.loads(json.dumps(engine.answer(asked, rows, outputs), allow_nan=False))


def near(expected: Any) -> Any:
    """The same answer, with numbers that may differ by rounding: other batches round otherwise."""
    if isinstance(expected, list):
        return [near(one) for one in expected]
    if isinstance(expected, dict):
        return {key: near(value) for key, value in expected.items()}
    return pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else expected
