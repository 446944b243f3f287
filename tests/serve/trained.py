"""A tiny trained model in a registry, the serve config that serves it, and its answers by a plain forward pass."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from banjoray.config.job import JobConfig
from banjoray.data.probe import write_probe
from banjoray.registry import Registry
from banjoray.training.checkpoints import Store
from banjoray.training.export import export
from banjoray.training.interface import Callbacks
from banjoray.training.loop import fit
from banjoray.training.preflight import prepare

Text = str | tuple[str, str]


@dataclass(frozen=True)
class Shelf:
    """A registry whose model ``tiny`` has versions 1 and 2, of the runs ``first`` and ``second``."""

    folder: Path

    @property
    def registry(self) -> Registry:
        return Registry(str(self.folder / "registry"))

    def config(self, name: str = "serve.yaml", **changes: Any) -> Path:
        """A serve config for ``tiny@production``; ``changes`` replace keys of the application's args."""
        exact = {"engine": "torch", "precision": "fp32"}
        args = {"model": "tiny@production", "registry": self.registry.root} | exact | changes
        application = {
            "name": "tiny",
            "route_prefix": "/",
            "import_path": "banjoray.serving.app:build",
            "args": args,
            "deployments": [{"name": "Endpoint", "max_ongoing_requests": 64, "ray_actor_options": {"num_cpus": 0.5}}],
        }
        file = self.folder / name
        file.write_text(yaml.safe_dump({"applications": [application]}))
        return file


def stock(folder: Path, lively_job: Callable[..., JobConfig]) -> Shelf:
    """Train two models in this process and register them; ``production`` is version 1."""
    shelf = Shelf(folder)
    for seed, run in enumerate(("first", "second")):
        job = lively_job(folder, train__epochs=4, train__seed=seed)
        ready = prepare(job)
        at = f"{job.storage}/{run}"
        best = fit(job, ready.rows, ready.task, ready.start, at, Callbacks()).checkpoint
        export(job, ready.start.model(), ready.start.tokenizer, best, Store(at, print).local(best), Path(at) / "model")
        write_probe(ready.splits.validation, 64, Path(at) / "model")
        shelf.registry.register(
            "tiny",
            Path(at) / "model",
            task=job.task,
            labels=ready.splits.labels,
            lineage={"run": run, "trial": None, "data": ready.fingerprint},
            verify=lambda _, metrics=best.metrics: metrics,  # type: ignore[misc]
        )
    shelf.registry.promote("tiny", 1, "production")
    return shelf


def plain_scores(model_folder: Path, texts: Sequence[Text]) -> list[dict[str, float]]:
    """Label -> probability of each text or pair, one at a time, with nothing of banjoray's."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = []
    for text in texts:
        pair = (text,) if isinstance(text, str) else text
        with torch.inference_mode():
            logits = model(**tokenizer(*pair, truncation=True, max_length=40, return_tensors="pt")).logits[0]
        probabilities = logits.softmax(-1).tolist()
        found.append({model.config.id2label[number]: value for number, value in enumerate(probabilities)})
    return found


def free_port() -> int:
    """A port that nobody on this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
