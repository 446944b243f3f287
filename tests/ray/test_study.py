"""A study that is stopped or killed goes on by the same command; what it may take is never passed."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

import banjoray
from banjoray.config.job import JobConfig
from banjoray.errors import ConfigError, TrainingFailed
from banjoray.registry import Registry
from banjoray.tuning.record import recorded
from banjoray.tuning.study import TrialMoment
from commands import Command
from factories import make_job

RATES = [3e-4, 1e-3, 3e-3]
SPACE: dict[str, Any] = {"train.learning_rate": {"choice": RATES}, "freeze": {"choice": ["none", {"layers": 2}]}}


def search_job(folder: Path, **tune: Any) -> JobConfig:
    """A search with one trial at a time, by the loss."""
    usual = {"space": SPACE, "trials": 4, "scheduler": "none", "concurrent": 1}
    best: dict[str, Any] = {"train__metric": "loss", "train__mode": "min"}
    return make_job(folder, **best, tune=usual | tune)


def told_of(study: Any) -> list[tuple[str, int, float | None]]:
    """What is equal in two studies of the same job: names of trials are drawn anew."""
    return [(json.dumps(trial.values, sort_keys=True), trial.epochs, trial.score) for trial in study.trials]


def written(job: JobConfig) -> dict[Path, int]:
    """Every checkpoint of every finished trial, and when it was written."""
    records = Path(job.storage).glob("*/trials/*/trial.json")
    done = [file.parent for file in records if recorded(str(file.parent)).done]
    return {file: file.stat().st_mtime_ns for folder in done for file in folder.glob("checkpoints/step-*/*")}


class _Gone(Exception):
    """A driver that was stopped."""


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("searcher", "scheduler"), [("random", "asha"), ("grid", "none"), ("optuna", "median")])
def test_search_that_is_stopped_goes_on_without_running_a_finished_trial_again(
    tmp_path: Path, searcher: str, scheduler: str
) -> None:
    job = search_job(tmp_path, searcher=searcher, scheduler=scheduler, trials=None if searcher == "grid" else 4)
    points = 6 if searcher == "grid" else 4

    def stop(line: str) -> None:
        lines.append(line)
        if len({said.split()[1] for said in lines if said.startswith("  trial ")}) == 3:
            raise _Gone

    lines: list[str] = []
    with pytest.raises(Exception, match="_Gone") as raised:
        banjoray.tune(job, say=stop)
    assert raised
    before = written(job)
    assert before
    rest: list[str] = []
    last: dict[str, TrialMoment] = {}
    study = banjoray.tune(job, watch=lambda moment: last.update({moment.trial: moment}), say=rest.append)
    assert rest[0].startswith(f"continuing study {study.study_id}: {points} trials")
    assert len(study.trials) == points
    assert {file: file.stat().st_mtime_ns for file in before if file.exists()}.items() <= before.items()
    assert all(trial.score is not None for trial in study.trials)
    # Of those that had ended before, too.
    told = {trial.trial: (trial.score, trial.epochs) for trial in study.trials}
    assert {name: (moment.best, moment.epoch) for name, moment in last.items()} == told
    if searcher == "grid":
        assert sorted(one[0] for one in told_of(study)) == sorted(
            json.dumps({"freeze": freeze, "train.learning_rate": rate})
            for rate in RATES
            for freeze in SPACE["freeze"]["choice"]
        )
        assert {trial.epochs for trial in study.trials} == {2}
    assert Registry(job.registry.root).resolve(study.version).lineage["trial"] == study.trial


@dataclass
class Killed:
    """A study whose driver was killed, and the same one that nothing befell."""

    before: dict[Path, int]
    after: dict[Path, int]
    answer: dict[str, Any]
    undisturbed: Any
    said: str


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Iterator[Killed]:  # noqa: ARG001
    folder, whole = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("whole")
    job = search_job(folder).with_values({"train.epochs": 12})
    command = Command(folder, job, "tune")
    try:
        command.until(lambda: len({file.parents[2] for file in written(job)}) >= 2)
        before = written(job)
        command.process.kill()
        command.process.wait()
        # Ray's processes notice that their driver is gone.
        time.sleep(2)
        command.start()
        assert command.process.wait() == 0, command.err.read_text()[-3000:]
        answer = json.loads(command.out.read_text())
        places = {"storage": str(whole / "runs"), "registry.root": str(whole / "registry")}
        undisturbed = banjoray.tune(job.with_values(places))
        yield Killed(before, written(job), answer, undisturbed, command.err.read_text())
    finally:
        command.end()


@pytest.mark.timeout(900)
def test_study_whose_driver_is_killed_goes_on_and_runs_no_finished_trial_again(killed: Killed) -> None:
    assert "continuing study tiny-tune-" in killed.said
    # What is still there of a finished trial, its best checkpoint and its last, was not written again.
    left = {file: written for file, written in killed.after.items() if file in killed.before}
    assert len({file.parents[2] for file in left}) >= 2
    assert left.items() <= killed.before.items()


@pytest.mark.timeout(900)
def test_study_whose_driver_is_killed_ends_as_one_that_was_not(killed: Killed) -> None:
    found = [
        (json.dumps(trial["values"], sort_keys=True), trial["epochs"], trial["score"])
        for trial in killed.answer["trials"]
    ]
    assert found == told_of(killed.undisturbed)


@pytest.mark.usefixtures("local_ray")
def test_rows_that_cannot_be_read_any_more_stop_the_study_with_the_reason(tmp_path: Path) -> None:
    job = search_job(tmp_path)
    assert job.data.files
    rows = Path(job.data.files.train)

    def spoil(line: str) -> None:
        lines.append(line)
        if line.startswith("starting study"):
            rows.write_text("", encoding="utf-8")

    lines: list[str] = []
    with pytest.raises(TrainingFailed, match=r"trial \w+: DataError: .*is empty; needed rows; the study is stopped"):
        banjoray.tune(job, say=spoil)
    assert len([line for line in lines if "failed: DataError" in line]) == 1


def _size(folder: Path) -> int:
    """Bytes of all checkpoints; looked at again where one went while they were counted."""
    while True:
        with suppress(FileNotFoundError):
            return sum(file.stat().st_size for file in folder.glob("*/trials/*/checkpoints/**/*") if file.is_file())


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_disk_never_passes_its_budget_and_freed_bytes_are_told(tmp_path: Path, searcher: str) -> None:
    # A share for the trial that runs, and one for those that are done, of which not all fit.
    budget = int(2 * 0.0018 * 2**30)
    space = {"train.seed": {"choice": [1, 2, 3, 4]}}
    job = search_job(tmp_path, disk_budget_gib=budget / 2**30, space=space, searcher=searcher)
    sizes: list[int] = []
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        sizes.append(_size(Path(job.storage)))

    tight = banjoray.tune(job, say=say)
    # One at a time, as asked, though there is room for four: what is said of a trial is not broken by another.
    names = [line.split()[1] for line in lines if line.startswith("  trial ")]
    assert [name for name, _ in groupby(names)] == list(dict.fromkeys(names))
    assert len(set(names)) == 4
    assert max(sizes) <= budget
    assert _size(Path(job.storage)) <= budget
    # The checkpoints of four trials together would not fit.
    assert _size(Path(job.storage)) + tight.freed_bytes > budget


@pytest.mark.usefixtures("local_ray")
def test_disk_budget_too_small_for_one_trial_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.checkpoint_budget_gib: found .*, needed at least"):
        banjoray.tune(search_job(tmp_path, disk_budget_gib=1e-5))


@pytest.mark.usefixtures("local_ray")
def test_time_budget_ends_the_study_with_the_best_so_far(tmp_path: Path) -> None:
    job = search_job(tmp_path, time_budget_s=40, trials=40).with_values({"train.epochs": 400})
    study = banjoray.tune(job)
    assert 0 < sum(trial.epochs for trial in study.trials) < 40 * 400
    assert study.trials[0].score is not None
    assert Registry(job.registry.root).resolve(study.version).lineage["trial"] == study.trial


@pytest.mark.usefixtures("local_ray")
def test_trials_share_the_states_of_what_they_freeze(tmp_path: Path, lively_model: Callable[..., Path]) -> None:
    lively_model(tmp_path / "base")
    space = {"train.learning_rate": {"choice": RATES}, "freeze": {"choice": [{"layers": 2}]}}
    job = search_job(tmp_path, space=space, searcher="grid", trials=None)
    moments: list[TrialMoment] = []
    study = banjoray.tune(job.with_values({"cache.prefix": "always"}), watch=moments.append)
    assert sorted(trial.prefix for trial in study.trials) == ["computed", "read", "read"]
    for trial in study.trials:
        seen = [moment for moment in moments if moment.trial == trial.trial]
        assert [(moment.epoch, moment.status) for moment in seen] == [
            *((epoch, "running") for epoch in (0, 1, 2)),
            (2, "done"),
        ]
        assert [moment.score for moment in seen[1:3]] == [entry["loss"] for entry in trial.history]
        assert [moment.states for moment in seen] == ["", *[trial.prefix] * 3]
        assert (seen[-1].best, seen[-1].epochs, seen[-1].values) == (trial.score, 2, trial.values)
        assert 0 < seen[1].seconds <= seen[2].seconds <= seen[3].seconds == pytest.approx(trial.seconds, abs=1e-3)
    assert {moment.trial for moment in moments} == {trial.trial for trial in study.trials}
    never = banjoray.tune(job.with_values({"cache.prefix": "never", "storage": str(tmp_path / "never")}))
    assert {trial.prefix for trial in never.trials} == {""}
    scores = [{json.dumps(trial.values): trial.score for trial in one.trials} for one in (study, never)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"searcher": "grid", "space": {"train.learning_rate": {"uniform": [0.1, 0.2]}}}, "found a range for train"),
        ({"searcher": "grid", "trials": 5}, "found 5 with searcher grid, which tries all 6 points"),
        ({"searcher": "bohb"}, "tune.searcher: found 'bohb'"),
        ({"scheduler": "pbt"}, "tune.scheduler: found 'pbt'"),
        ({"disk_budget_gib": 0}, "tune.disk_budget_gib: found 0"),
    ],
)
def test_search_that_cannot_work_is_refused_in_one_line(tmp_path: Path, tune: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search_job(tmp_path, **tune)
