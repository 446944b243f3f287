"""Replicas of random weights, and their HTTP application in this process: no Ray, no socket, nothing is trained."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.config.serve import ServeConfig
from banjoray.models.loading import Base, load_tokenizer
from banjoray.registry import ModelVersion
from banjoray.serving.engine import Engine
from banjoray.serving.replica import Replica, Slot
from banjoray.serving.routes import application
from banjoray.tasks.generation import set_generation
from banjoray.tasks.task import task_for
from factories import tiny_model, tiny_tokenizer
from writers import words_tokenizer, writer, writing_job

LABELS = ("sadness", "joy", "love")
MAX_ROWS = 8
CHAT = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user begins') }}{% endif %}"
    "{% for m in messages %}{{ m.role + ' ' + m.content + ' . ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


class InProcess:
    """An application that is asked without a server; what it does not answer with a status is raised here."""

    def __init__(self, engine: Engine, **limits: Any) -> None:
        config = validate(ServeConfig, {"model": "tiny@1", "max_rows": MAX_ROWS} | limits, "args")
        self.engine = engine
        self.replica = Replica(config)
        self.served = self.replica.serve(engine)
        self.replica.slots["tiny"] = Slot(self.served)
        self.app = application(lambda: self.replica)
        self.root = ""
        self._runner = asyncio.Runner()

    def request(self, method: str, path: str, **what: Any) -> httpx.Response:
        response: httpx.Response = self.run(lambda client: client.request(method, path, **what))
        return response

    def post(self, path: str, json: Any, version: str = "tiny@1") -> Any:
        """The body of an answer that has to be 200."""
        response = self.request("POST", path, json=json)
        assert response.status_code == 200, response.text
        assert response.headers["x-model-version"] == version
        return response.json()

    def run(self, ask: Callable[[httpx.AsyncClient], Any]) -> Any:
        """What ``ask`` gives for a client of the application."""

        async def asked() -> Any:
            transport = httpx.ASGITransport(self.app, root_path=self.root)
            async with httpx.AsyncClient(transport=transport, base_url="http://in.process") as client:
                return await ask(client)

        return self._runner.run(asked())

    def close(self) -> None:
        self._runner.close()
        self.replica._thread.shutdown()


def _job(task: str) -> JobConfig:
    tree = {"name": "tiny", "task": task, "data": {"source": "banjoray:emotion", "max_length": 40, "stride": 8}}
    return validate(JobConfig, tree, "test job")


def _version(task: str, labels: tuple[str, ...] = ()) -> ModelVersion:
    return ModelVersion("tiny", 1, task, labels, {}, {"run": "none"}, {}, "2026-01-02T03:04:05+00:00", "0" * 64, "-")


def encoder(folder: Path, task: str, **changes: Any) -> Engine:
    """A tiny BERT for a task, its weights wide, so that texts differ; ``changes`` are keys of the job."""
    import torch
    import transformers

    tiny_model(folder)
    named = task_for(task)
    labels = LABELS if named.labelled else ()
    config = transformers.AutoConfig.from_pretrained(folder, initializer_range=0.3)
    job = _job(task)
    if named.labelled:
        config.update({"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}})
    if changes:
        job = job.with_values(changes)
        config.num_labels = 1
    torch.manual_seed(7)
    model = getattr(transformers, named.auto_model).from_config(config).eval()
    return Engine(_version(task, labels), named.settled(job), model, tiny_tokenizer(), job)


def talker(folder: Path, template: str | None = CHAT) -> Engine:
    """A tiny Llama that goes on with texts, and answers conversations where it has a ``template``."""
    import transformers

    tokenizer = words_tokenizer("$A")
    tokenizer.add_tokens(["system", "user", "assistant"])
    tokenizer.chat_template = template
    base = writer(folder / "base", "llama", tokenizer, initializer_range=0.3)
    job = writing_job(folder, "text-generation", "llama", data__columns__target=None)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    loaded = load_tokenizer(Base(str(base), "", {}))
    set_generation(model, loaded, job)
    return Engine(_version("text-generation"), task_for("text-generation"), model, loaded, job)
