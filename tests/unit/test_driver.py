"""What a watcher is told of the trials of a study: from what Tune reports, and what trials have written down."""

from pathlib import Path
from typing import Any

import pytest

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.errors import TrainingFailed
from banjoray.tuning.disk import Janitor
from banjoray.tuning.driver import Driver, folder_of
from banjoray.tuning.failures import Failure
from banjoray.tuning.record import Record
from banjoray.tuning.study import TrialMoment, in_lines

VALUES = {"train.learning_rate": "1e-3"}


@pytest.fixture
def job() -> JobConfig:
    tree = {
        "name": "driven",
        "task": "text-classification",
        "data": {"source": "banjoray:emotion"},
        "train": {"metric": "loss", "mode": "min", "epochs": 3},
        "tune": {"space": {"train.learning_rate": {"choice": [1e-3]}}, "trials": 1},
    }
    return validate(JobConfig, tree, "test job")


class Watched:
    """A driver of a study in a folder, and all that its watcher was told."""

    def __init__(self, job: JobConfig, folder: Path) -> None:
        self._study, self.told = str(folder), list[TrialMoment]()
        self.driver = Driver(job, self._study, self.told.append, Janitor(job, 1), grouped=False)

    def record(self, *losses: float, **changes: Any) -> None:
        """What trial t has written down."""
        history = tuple({"epoch": epoch, "loss": loss} for epoch, loss in enumerate(losses, start=1))
        Record(history=history, **changes).save(folder_of(self._study, "t"))

    def report(self, epoch: int, loss: float) -> TrialMoment:
        """The moment of a result as Tune hands it on."""
        self.driver.reported("t", {"epoch": epoch, "loss": loss, "time_total_s": 99.0})
        return self.told[-1]


@pytest.fixture
def watched(job: JobConfig, tmp_path: Path) -> Watched:
    return Watched(job, tmp_path)


def test_a_trial_is_told_from_its_begin_to_its_end_with_its_own_time_and_states(watched: Watched) -> None:
    watched.driver.begun("t", VALUES)
    watched.record(0.5, seconds=2.0, prefix="read")
    watched.report(1, 0.5)
    watched.record(0.5, 0.75, seconds=4.0, prefix="read")
    watched.report(2, 0.75)
    watched.record(0.5, 0.75, 0.25, seconds=6.0, prefix="read", done=True)
    watched.report(3, 0.25)
    watched.driver.ended("t", [])
    told = [(one.epoch, one.score, one.best, one.seconds, one.states, one.status) for one in watched.told]
    assert told == [
        (0, None, None, 0.0, "", "running"),
        (1, 0.5, 0.5, 2.0, "read", "running"),
        (2, 0.75, 0.5, 4.0, "read", "running"),
        (3, 0.25, 0.25, 6.0, "read", "running"),
        (3, 0.25, 0.25, 6.0, "read", "done"),
    ]
    assert {(one.trial, one.epochs, one.values["train.learning_rate"]) for one in watched.told} == {("t", 3, 1e-3)}


def test_the_time_of_a_trial_that_writes_nothing_before_its_end_is_as_tune_measured_it(watched: Watched) -> None:
    watched.driver.begun("t", VALUES)
    assert watched.report(1, 0.5).seconds == 99.0


def test_last_words_without_a_score_are_no_epoch(watched: Watched) -> None:
    watched.driver.begun("t", VALUES)
    watched.driver.reported("t", {"done": True})
    assert len(watched.told) == 1


@pytest.mark.parametrize(
    ("losses", "changes", "status", "reason"),
    [
        ([0.5, 0.25], {}, "stopped", ""),
        ([0.5, 0.25], {"done": True}, "done", ""),
        ([0.5, 0.25, 0.75], {}, "done", ""),
        ([0.5], {"failure": Failure("no_score", "loss is nan")}, "failed", "loss is nan"),
    ],
)
def test_how_a_trial_ended_is_told(
    watched: Watched, losses: list[float], changes: dict[str, Any], status: str, reason: str
) -> None:
    watched.driver.begun("t", VALUES)
    watched.record(*losses, seconds=3.0, **changes)
    watched.driver.ended("t", [])
    last = watched.told[-1]
    assert (last.status, last.reason, last.epoch, last.best) == (status, reason, len(losses), min(losses))


def test_a_trial_that_a_time_budget_ends_before_it_began_is_told_of_nowhere(watched: Watched) -> None:
    watched.driver.ended("t", [])
    watched.driver.open({"t": VALUES})
    assert watched.told == []


def test_a_trial_whose_process_died_is_told_as_failed_and_then_runs_again(watched: Watched) -> None:
    watched.driver.begun("t", VALUES)
    watched.record(0.5, seconds=2.0)
    watched.report(1, 0.5)
    watched.driver.died("t")
    watched.driver.begun("t", VALUES)
    died, again = watched.told[-2:]
    assert (died.status, died.reason, died.epoch) == ("failed", "its process died", 1)
    assert (again.status, again.reason, again.epoch, again.best, again.seconds) == ("running", "", 0, 0.5, 2.0)


def test_a_bug_in_a_trial_is_told_and_ends_the_study(watched: Watched) -> None:
    watched.driver.begun("t", VALUES)
    watched.record(failure=Failure("bug", "DataError: no rows"))
    with pytest.raises(TrainingFailed, match="trial t: DataError: no rows"):
        watched.driver.died("t")
    assert watched.driver.bug == "trial t: DataError: no rows"
    assert watched.told[-1].reason == "DataError: no rows"


def test_trials_that_ended_before_a_study_went_on_are_told_but_not_to_a_log_again(watched: Watched) -> None:
    watched.record(0.5, 0.25, seconds=5.0, prefix="computed", failure=Failure("no_score", "loss is nan"))
    before = watched.driver.opened
    watched.driver.open({"t": VALUES})
    assert (before, watched.driver.opened) == (False, True)
    (told,) = watched.told
    assert (told.best, told.seconds, told.states, told.status) == (0.25, 5.0, "computed", "failed")
    said: list[str] = []
    in_lines(said.append, "loss")(told)
    assert said == []
