"""What becomes of a head that the base has is said where people see it, and nothing where it has none."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from banjoray.config.job import JobConfig
from banjoray.reports.progress import RunProgress
from banjoray.training.interface import Callbacks
from banjoray.training.loop import fit
from banjoray.training.preflight import prepare
from factories import make_job, tiny_model
from problems import problem_job

pytestmark = pytest.mark.usefixtures("own_cache")

EMOTIONS = ("anger", "fear", "joy", "love", "sadness", "surprise")
# The part of the head that has as many outputs as there are labels.
MODULES: Mapping[str, str] = {"bert": "classifier", "gpt2": "score", "roberta": "classifier.out_proj"}


def with_head(folder: Path, architecture: str, names: tuple[str, ...]) -> Path:
    """A base that was trained to tell these labels apart."""
    from transformers import AutoModelForSequenceClassification

    tiny_model(folder, architecture)
    named: dict[str, Any] = {"num_labels": len(names), "id2label": dict(enumerate(names))}
    named["label2id"] = {name: number for number, name in enumerate(names)}
    AutoModelForSequenceClassification.from_pretrained(folder, **named).save_pretrained(folder)
    return folder


def shown(job: JobConfig, run: Path) -> str:
    """What a log gets of a run."""
    console = Console(file=io.StringIO(), width=200)
    ready = prepare(job)
    fit(job, ready.rows, ready.task, ready.start, str(run), Callbacks(watch=RunProgress(console)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("architecture", MODULES)
def test_a_head_of_another_size_is_named_with_both_sizes_when_a_run_starts(tmp_path: Path, architecture: str) -> None:
    with_head(tmp_path / "base", architecture, ("no", "yes"))
    job = make_job(tmp_path, train__epochs=1)
    assert f"{MODULES[architecture]} re-initialised: 2 -> 6 labels" in shown(job, tmp_path / "run")
    # It goes on with its own head.
    again = shown(job.with_values({"train.epochs": 2}), tmp_path / "run")
    assert "going on from" in again
    assert "re-initialised" not in again


def test_a_head_for_a_number_has_outputs(tmp_path: Path) -> None:
    with_head(tmp_path / "base", "bert", ("no", "yes"))
    told = shown(problem_job(tmp_path, "regression", train__epochs=1), tmp_path / "run")
    assert "classifier re-initialised: 2 -> 1 outputs" in told


@pytest.mark.parametrize("architecture", MODULES)
def test_of_a_base_without_a_head_nothing_is_said(tmp_path: Path, architecture: str) -> None:
    tiny_model(tmp_path / "base", architecture)
    told = shown(make_job(tmp_path, train__epochs=1), tmp_path / "run")
    assert "precision" in told
    assert "re-initialised" not in told
    assert "kept" not in told


@pytest.mark.parametrize("architecture", MODULES)
def test_a_head_that_is_taken_over_with_other_labels_is_told_with_both_names(tmp_path: Path, architecture: str) -> None:
    with_head(tmp_path / "base", architecture, ("a", "b", "c", "d", "e", "f"))
    told = shown(make_job(tmp_path, train__epochs=1), tmp_path / "run")
    now = "anger, fear, joy, love, sadness, ..."
    assert f"{MODULES[architecture]} kept: its 6 labels were named a, b, c, d, e, ...; now {now}" in told


def test_a_head_that_has_the_jobs_labels_is_taken_over_without_a_word(tmp_path: Path) -> None:
    with_head(tmp_path / "base", "bert", EMOTIONS)
    told = shown(make_job(tmp_path, train__epochs=1), tmp_path / "run")
    assert "kept" not in told
    assert "re-initialised" not in told
