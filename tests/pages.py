"""Playgrounds of tiny models of random weights, one application per task behind one server on 127.0.0.1; no Ray."""

import copy
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.models.loading import Base, load_tokenizer
from banjoray.serving.engine import Engine
from banjoray.serving.replica import Slot
from banjoray.tasks.generation import set_generation
from banjoray.tasks.task import task_for
from endpoints import version
from factories import tiny_model, tiny_tokenizer
from masked import masked_config, pieces_tokenizer
from replicas import InProcess, encoder, talker
from writers import writing_job

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
EMOTIONS = ("sadness", "joy", "love", "anger", "fear", "surprise")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
PATIENCE_S = 60.0


def _job(task: str, changes: Mapping[str, Any]) -> JobConfig:
    tree = {"name": "tiny", "task": task, "data": {"source": "banjoray:emotion", "max_length": 40, "stride": 8}}
    return validate(JobConfig, tree, "test job").with_values(dict(changes))


def labelled(folder: Path, task: str, labels: tuple[str, ...] = EMOTIONS, seed: int = 7, **changes: Any) -> Engine:
    """A tiny BERT that gives every text, or token, wide scores for these labels; ``changes``: keys, ``__`` for dots."""
    import torch
    import transformers

    tokenizer = tiny_tokenizer()
    job = _job(task, {key.replace("__", "."): value for key, value in changes.items()})
    settled = task_for(task).settled(job)
    config = transformers.AutoConfig.from_pretrained(tiny_model(folder), initializer_range=0.5)
    config.update({"vocab_size": len(tokenizer), "id2label": dict(enumerate(labels))})
    torch.manual_seed(seed)
    model = getattr(transformers, settled.auto_model).from_config(config).eval()
    return Engine(version(task, labels), settled, model, tokenizer, job)


def named(engine: Engine, model: str) -> Engine:
    """The same under another name."""
    other = copy.copy(engine)
    other.version = replace(engine.version, model=model)
    return other


def filler() -> Engine:
    """A tiny BERT that fills masks."""
    import torch
    import transformers

    tokenizer = pieces_tokenizer()
    torch.manual_seed(7)
    model = transformers.AutoModelForMaskedLM.from_config(masked_config("bert", len(tokenizer))).eval()
    task = task_for("fill-mask").for_tokenizer(tokenizer)
    return Engine(version("fill-mask"), task, model, tokenizer, _job("fill-mask", {}))


def shortener(folder: Path) -> Engine:
    """A tiny T5 that goes on with number words."""
    import transformers

    job = writing_job(folder, "summarization", "t5")
    model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(job.model.base).eval()
    tokenizer = load_tokenizer(Base(str(job.model.base), "", {}))
    set_generation(model, tokenizer, job)
    return Engine(version("summarization"), task_for("summarization").settled(job), model, tokenizer, job)


ENGINES: Mapping[str, Callable[[Path], Engine]] = {
    "labels": lambda folder: labelled(folder, "text-classification"),
    "several": lambda folder: labelled(folder, "text-classification", classification__problem_type="multi_label"),
    "number": lambda folder: encoder(folder, "text-classification", **{"classification.problem_type": "regression"}),
    "pair": lambda folder: labelled(folder, "text-classification", ("no", "yes"), data__columns__text_pair="second"),
    "any": lambda folder: labelled(
        folder, "zero-shot-classification", ("contradiction", "entailment"), data__columns__text_pair="second"
    ),
    "entities": lambda folder: labelled(folder, "token-classification", TAGS, seed=11),
    "answers": lambda folder: encoder(folder, "question-answering"),
    "masks": lambda _: filler(),
    "vectors": lambda folder: encoder(folder, "feature-extraction"),
    "writer": lambda folder: talker(folder, None),
    "shortener": shortener,
}


@contextmanager
def served(app: Any, port: int = 0) -> Iterator[str]:
    """An application behind uvicorn on 127.0.0.1, a free port if 0; its address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)


@contextmanager
def playgrounds(folder: Path, **closed: Any) -> Iterator[tuple[str, dict[str, InProcess]]]:
    """The address of all of `ENGINES` under their names, and who answers; under "closed" "labels" with these limits."""
    made = {name: InProcess(make(folder / name), access_log=False) for name, make in ENGINES.items()}
    both = made["both"] = InProcess(made["labels"].engine, access_log=False)
    both.replica.slots["writer"] = Slot(both.replica.serve(named(made["writer"].engine, "writer")))
    if closed:
        made["closed"] = InProcess(made["labels"].engine, access_log=False, **closed)
    try:
        with served(Starlette(routes=[Mount(f"/{name}", found.app) for name, found in made.items()])) as address:
            yield address, made
    finally:
        for found in made.values():
            found.close()


def wait_until(true: Callable[[], Any]) -> None:
    """Return once it is true; AssertionError if it never is."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def chromium() -> str | None:
    """The browser of this machine, None where there is none."""
    return next((path for name in CHROMIUMS if (path := shutil.which(name))), None)


def ask(address: str, request: Mapping[str, Any]) -> Any:
    """The body of an endpoint's answer."""
    response = httpx.post(f"{address}/models/tiny", json=request)
    assert response.status_code == 200, response.text
    return response.json()
