"""The verdict on a version beside the one that answers: by that one's probe rows."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from banjoray.config.job import JobConfig
from banjoray.config.rollout import Gate
from banjoray.data.splits import Split
from banjoray.registry import ModelVersion
from banjoray.serving.candidates import compared
from banjoray.serving.engine import Engine
from banjoray.training.preflight import Ready, prepare
from factories import make_job
from masked import masked_job
from problems import problem_job
from tagged import tagging_job
from writers import writing_job

JOBS: dict[str, Callable[[Path], JobConfig]] = {
    "text-classification": make_job,
    "several-labels": lambda folder: problem_job(folder, "multi_label"),
    "regression": lambda folder: problem_job(folder, "regression"),
    "token-classification": tagging_job,
    "fill-mask": masked_job,
    "summarization": lambda folder: writing_job(folder, "summarization", "t5"),
}


def same_times(passes: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Every pass is made, and takes 10 ms."""
    for run in passes.values():
        run()
    return dict.fromkeys(passes, 0.01)


@pytest.fixture(scope="module", params=JOBS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ready, Engine]:
    job = JOBS[request.param](tmp_path_factory.mktemp(request.param))
    ready = prepare(job)
    model: Any = ready.start.model().eval()
    task = ready.task.for_config(model.config).for_tokenizer(ready.start.tokenizer)
    version = ModelVersion("m", 1, job.task, (), {}, {}, {}, "", "a" * 64, "")
    return ready, Engine(version, task, model, ready.start.tokenizer, job)


def other(engine: Engine, change: Callable[[Any], object] = lambda model: None, **changes: Any) -> Engine:
    """Version 2, the same but for a change of its model."""
    model = copy.deepcopy(engine.model)
    with torch.no_grad():
        change(model)
    version = replace(engine.version, version=2, **changes)
    return Engine(version, engine.task, model, engine.tokenizer, engine.job)


def rows(ready: Ready) -> Split:
    return ready.splits.validation


def test_a_version_that_says_the_same_passes_and_is_told_as_the_same(made: tuple[Ready, Engine]) -> None:
    ready, live = made
    found = compared(other(live), live, rows(ready), Gate(max_drop=0.0), same_times)
    assert (found.version, found.against, found.why) == ("m@2", "m@1", "")
    assert found.score == found.against_score
    assert found.metric == live.job.train.metric
    assert found.rows == len(rows(ready))
    assert found.same == (None if live.task.generates else 1.0)
    assert (found.ms, found.against_ms) == (10.0, 10.0)


def test_a_version_whose_weights_are_no_numbers_is_refused_whatever_the_gate(made: tuple[Ready, Engine]) -> None:
    ready, live = made

    def spoil(model: Any) -> None:
        for weight in model.parameters():
            weight.fill_(float("nan"))

    found = compared(other(live, spoil), live, rows(ready), Gate(max_drop=1e9, max_slowdown=1e9), same_times)
    assert found.why == "its outputs on the probe rows hold NaN"


def test_a_slower_version_is_refused_with_both_times(made: tuple[Ready, Engine]) -> None:
    ready, live = made

    def slow(passes: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        return dict(zip(passes, (0.016, 0.01), strict=True))

    found = compared(other(live), live, rows(ready), Gate(), slow)
    assert found.why == "its passes take 16 ms, those of production 10; may take 1.5 times as long (gate.max_slowdown)"
    assert not compared(other(live), live, rows(ready), Gate(max_slowdown=1.6), slow).why


def test_another_task_is_refused(made: tuple[Ready, Engine]) -> None:
    ready, live = made
    found = compared(other(live, task="something-else"), live, rows(ready), Gate(), same_times)
    assert found.why.startswith("its task is something-else")
    assert f"; needed {live.version.task}" in found.why


def test_another_kind_of_labels_is_refused(made: tuple[Ready, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    ready, live = made
    candidate = other(live)
    candidate.task = copy.copy(live.task)
    monkeypatch.setattr(candidate.task, "problem_type", "another_kind", raising=False)
    found = compared(candidate, live, rows(ready), Gate(), same_times)
    assert found.why.startswith(f"its task is {live.version.task} another_kind; needed {live.version.task}")


def test_labels_in_another_order_are_refused(made: tuple[Ready, Engine]) -> None:
    ready, live = made
    if not live.labels:
        pytest.skip("this task has no labels")
    candidate = other(live)
    candidate.labels = tuple(reversed(live.labels))
    found = compared(candidate, live, rows(ready), Gate(), same_times)
    assert found.why.startswith(f"its labels are {', '.join(candidate.labels)}; needed {', '.join(live.labels)}")


def test_without_probe_rows_there_is_no_verdict_but_a_refusal(made: tuple[Ready, Engine]) -> None:
    _, live = made
    assert compared(other(live), live, None, Gate(), same_times).why.startswith("neither version has probe rows")
