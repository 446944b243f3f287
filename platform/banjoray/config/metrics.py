"""Which metric picks the best checkpoint where a job names none, and of which metrics less is better."""

from collections.abc import Mapping
from typing import Any

# Metrics of which less is better.
MINIMISED = ("loss", "perplexity", "mae", "calibration_error")
# Of every task, the metric that picks the best checkpoint unless the job names another.
USUAL_METRICS = {
    "text-classification": "f1_macro",
    "token-classification": "f1",
    "fill-mask": "perplexity",
    "question-answering": "f1",
    "summarization": "loss",
    "translation": "loss",
    "text-generation": "perplexity",
    "zero-shot-classification": "accuracy",
    "feature-extraction": "mrr",
}
# Of classification.problem_type, where it is another one.
USUAL_BY_PROBLEM = {"regression": "pearson"}


def usual_metric(job: Mapping[str, Any]) -> str | None:
    """The usual metric of a job that is not validated yet; None where its task is none."""
    section = job.get("classification")
    problem = section.get("problem_type") if isinstance(section, Mapping) else None
    return USUAL_BY_PROBLEM.get(str(problem)) or USUAL_METRICS.get(str(job.get("task")))


def with_usual_metrics(job: Mapping[str, Any]) -> Mapping[str, Any]:
    """A job that is not validated yet, with ``auto`` replaced in train.metric and registry.gate.metric."""
    usual = usual_metric(job)
    if usual is None:
        return job
    train, registry = job.get("train", {}), job.get("registry", {})
    if isinstance(train, dict) and train.get("metric", "auto") == "auto":
        job = {**job, "train": train | {"metric": usual}}
    gate = registry.get("gate", {}) if isinstance(registry, dict) else None
    if isinstance(gate, dict) and gate.get("metric", "auto") == "auto":
        job = {**job, "registry": registry | {"gate": gate | {"metric": usual}}}
    return job
