"""`banjoray.tune` on a real Ray: the best of all trials is registered, and nothing that can't work is tried."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import banjoray
from banjoray.config.job import JobConfig
from banjoray.errors import BanjorayError, ConfigError, ModelError
from banjoray.registry import Registry
from banjoray.training.checkpoints import Store
from factories import DEPTH, make_job

pytestmark = pytest.mark.usefixtures("local_ray")

SPLITS = ("train", "validation", "test")
# A decay of 1e30 throws the weights out of any float: the loss of such a trial is not a number.
SPACE: dict[str, Any] = {
    "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "freeze": {"choice": ["none", "embeddings", {"layers": 1}]},
    "train.weight_decay": {"choice": [0.01, 1e30]},
}


def search_job(folder: Path, space: dict[str, Any], trials: int, **changes: Any) -> JobConfig:
    tune = {"space": space, "trials": trials, "scheduler": "none", "concurrent": 2}
    best: dict[str, Any] = {"train__metric": "loss", "train__mode": "min"}
    return make_job(folder, **best | {"tune": tune} | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def job(folder: Path) -> JobConfig:
    # Paths that hold only where Ray was started, which is where the trials have to look them up.
    relative = {f"data__files__{split}": os.path.relpath(folder / f"data/{split}.jsonl") for split in SPLITS}
    return search_job(folder, SPACE, 4, name="searched", model__base=os.path.relpath(folder / "base"), **relative)


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def study(job: JobConfig, told: list[str]) -> Any:
    found = banjoray.tune(job, say=told.append)
    # The seed draws both decays within these trials; without one of each, some tests below would claim nothing.
    assert {trial.score is None for trial in found.trials} == {True, False}
    return found


def test_best_trial_is_registered_with_its_trial_in_the_lineage(job: JobConfig, study: Any) -> None:
    version = Registry(job.registry.root).resolve(study.version)
    assert (version.lineage["run"], version.lineage["trial"]) == (study.study_id, study.trials[0].trial)
    assert study.trial == study.trials[0].trial
    assert version.metrics["loss"] == pytest.approx(study.score, abs=1e-5)


def test_registered_files_are_those_of_the_winning_trial_with_its_values(job: JobConfig, study: Any) -> None:
    registered = Registry(job.registry.root).fetch(Registry(job.registry.root).resolve(study.version))
    trial = Store(f"{job.storage}/{study.study_id}/trials/{study.trial}", pytest.fail)
    best = trial.best("loss", "min")
    assert best is not None
    learned = load_file(trial.local(best) / "weights.safetensors")
    rows, found = learned.pop("banjoray.vocabulary_rows", None), load_file(registered / "model.safetensors")
    assert len(learned) > 10
    for name, tensor in learned.items():
        whole = found[name] if len(found[name]) == len(tensor) or rows is None else found[name][rows]
        assert torch.equal(whole, tensor), name
    saved = banjoray.load_job(registered / "job.yaml").to_json()
    drawn = study.trials[0].values
    assert saved["train"]["learning_rate"] == drawn["train.learning_rate"]
    assert saved["freeze"] == drawn["freeze"]


def test_trials_are_listed_best_first_and_failed_ones_last(study: Any) -> None:
    assert len(study.trials) == 4
    scores = [trial.score for trial in study.trials if trial.score is not None]
    assert scores == sorted(scores)
    assert study.score == scores[0]
    assert [trial.score for trial in study.trials[len(scores) :]] == [None] * (4 - len(scores))
    assert [trial.epochs for trial in study.trials[: len(scores)]] == [2] * len(scores)


def test_trial_that_fails_is_listed_with_its_reason_and_takes_no_other_down(study: Any, told: list[str]) -> None:
    for trial in study.trials:
        broken = trial.values["train.weight_decay"] > 1
        assert (trial.score is None) == broken
        if broken:
            assert "loss is nan and the gradients' norm nan at step" in trial.status
            assert f"  trial {trial.trial}  failed: {trial.status}" in told
        else:
            assert trial.status == "done"


def test_relative_paths_of_a_job_mean_in_a_trial_what_they_mean_here(job: JobConfig, study: Any) -> None:
    assert job.data.files is not None
    assert not Path(job.data.files.train).is_absolute()
    assert not Path(job.model.base).is_absolute()
    assert "done" in {trial.status for trial in study.trials}


def test_values_are_drawn_from_the_space(study: Any) -> None:
    rates = [trial.values["train.learning_rate"] for trial in study.trials]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert len(set(rates)) == 4
    assert all(trial.values["freeze"] in SPACE["freeze"]["choice"] for trial in study.trials)


def test_study_is_written_down_as_it_was_answered(job: JobConfig, study: Any) -> None:
    stored = json.loads((Path(job.storage) / study.study_id / "result.json").read_text())
    assert stored == json.loads(json.dumps(study.to_json()))


def test_trial_of_two_workers_runs_as_a_worker_group(tmp_path: Path) -> None:
    space = {"train.learning_rate": {"choice": [2e-3]}}
    job = search_job(tmp_path, space, 1, scale__workers=2, scale__strategy="zero2")
    study = banjoray.tune(job)
    assert [(trial.status, trial.epochs) for trial in study.trials] == [("done", 2)]
    version = Registry(job.registry.root).resolve("tiny@1")
    assert version.lineage["trial"] == study.trial
    assert version.metrics["loss"] == pytest.approx(study.score, abs=1e-5)


@pytest.mark.parametrize(
    ("space", "error", "message"),
    [
        ({"train.lerning_rate": {"choice": [1]}}, ConfigError, r"tune\.space: unknown key .* 'train\.learning_rate'"),
        ({"train.learning_rate": {"uniform": [0, 0.1]}}, ConfigError, r"train\.learning_rate: found 0"),
        ({"train.warmup_ratio": {"uniform": [0, 1]}}, ConfigError, r"train\.warmup_ratio: found 1"),
        ({"train.batch_size": {"uniform": [8, 32]}}, ConfigError, r"train\.batch_size: found 1"),
        ({"freeze": {"choice": ["none", {"layers": DEPTH + 1}]}}, ModelError, r"found 4; this model has 3 blocks"),
        ({"freeze": {"choice": ["most"]}}, ConfigError, r"freeze: found 'most', needed none, embeddings"),
        ({"data.max_length": {"choice": [40, 200]}}, ConfigError, r"data\.max_length: found 200"),
        ({"scale.workers": {"choice": [1, 2]}}, ConfigError, r"'scale\.workers' can't be searched"),
        ({"storage": {"choice": ["elsewhere"]}}, ConfigError, r"'storage' can't be searched"),
    ],
)
def test_space_that_cannot_work_is_refused_before_any_trial(
    tmp_path: Path, space: dict[str, Any], error: type[BanjorayError], message: str
) -> None:
    job = search_job(tmp_path, space, 2)
    with pytest.raises(error, match=message):
        banjoray.tune(job)
    assert list((tmp_path / "runs").glob("tiny-tune-*")) == []


def test_range_on_a_log_scale_that_starts_at_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune\.space\.train\.learning_rate.* needs values above 0"):
        search_job(tmp_path, {"train.learning_rate": {"loguniform": [0, 0.1]}}, 2)


def test_job_without_a_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"key 'tune' is missing"):
        banjoray.tune(make_job(tmp_path))
