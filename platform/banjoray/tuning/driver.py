"""The driver's side of a study that goes on: who watches it is told of every trial, and room is made on disk."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from banjoray.config.job import JobConfig
from banjoray.errors import TrainingFailed
from banjoray.tuning.disk import Janitor
from banjoray.tuning.record import Record, recorded
from banjoray.tuning.space import told_values
from banjoray.tuning.study import TrialMoment, Watch
from banjoray.tuning.trial import history_of


def folder_of(study: str, trial: str) -> str:
    """The folder (a path or URL) of a trial in that of its study."""
    return f"{study}/trials/{trial}"


class Driver:
    """What the driver knows of a study in folder ``study``. Not saved with it, as Tune's own objects are.

    ``grouped``: trials are worker groups. ``bug`` is why the study was stopped; ``opened`` says whether it was begun.
    """

    def __init__(self, job: JobConfig, study: str, watch: Watch, janitor: Janitor, grouped: bool) -> None:
        self._job, self._study, self._watch, self._janitor, self._grouped = job, study, watch, janitor, grouped
        self._latest: dict[str, TrialMoment] = {}
        self.bug: str | None = None
        self.opened = False

    def open(self, ended: Mapping[str, dict[str, Any]]) -> None:
        """Tell of trials that have ended before a study went on; by their values."""
        self.opened = True
        for trial, values in ended.items():
            record = recorded(folder_of(self._study, trial))
            # A time budget also ends trials that never began.
            if record.history or record.failure:
                self._tell(replace(self._at_the_end(self._new(trial, values), record), earlier=True))

    def begun(self, trial: str, values: dict[str, Any]) -> None:
        """Tell that a trial was started, for the first time or again: it reports again what it had reported."""
        known = self._latest.get(trial) or self._new(trial, values)
        spent = recorded(folder_of(self._study, trial)).seconds
        self._tell(replace(known, epoch=0, score=None, seconds=spent, status="running", reason=""))

    def reported(self, trial: str, result: Mapping[str, Any]) -> None:
        """Tell what a trial reported: Tune's result of an epoch, or of none (its last words)."""
        metric, known = self._job.train.metric, self._latest[trial]
        if metric not in result:
            return
        # Written before the report, but for a worker group, whose time Tune has measured.
        record = recorded(folder_of(self._study, trial))
        score = result[metric]
        self._tell(
            replace(
                known,
                epoch=result["epoch"],
                score=score,
                best=self._best([score] if known.best is None else [known.best, score]),
                seconds=record.seconds or result["time_total_s"],
                states=record.prefix,
            )
        )

    def ended(self, trial: str, others: Iterable[str]) -> None:
        """Tell how a trial ended; make room. ``others`` are those that had ended before."""
        folder = folder_of(self._study, trial)
        record = recorded(folder)
        if self._grouped:
            # The workers of a group that is stopped work on for a moment, and keep no record themselves.
            record = replace(record, history=history_of(folder))
            record.save(folder)
        if trial in self._latest:
            self._tell(self._at_the_end(self._latest[trial], record))
        self.tidy(others if self._grouped else (trial, *others))

    def tidy(self, trials: Iterable[str]) -> None:
        """Make room on disk: of trials that have ended."""
        self._janitor.tidy({trial: folder_of(self._study, trial) for trial in trials})

    def died(self, trial: str) -> None:
        """Tell why a trial's process ended; raises TrainingFailed if that would break others too."""
        failure = recorded(folder_of(self._study, trial)).failure
        reason = failure.reason if failure else "its process died"
        self._tell(replace(self._latest[trial], status="failed", reason=reason))
        if failure is not None:
            # Out of Tune's loop: stopped by Tune, the trials that are left would count as done.
            self.bug = f"trial {trial}: {failure.reason}"
            raise TrainingFailed(self.bug)

    def _tell(self, moment: TrialMoment) -> None:
        self._latest[moment.trial] = moment
        self._watch(moment)

    def _new(self, trial: str, values: dict[str, Any]) -> TrialMoment:
        return TrialMoment(trial, told_values(self._job, values), self._job.with_values(values).train.epochs)

    def _best(self, scores: list[float]) -> float | None:
        return (max if self._job.train.mode == "max" else min)(scores, default=None)

    def _at_the_end(self, known: TrialMoment, record: Record) -> TrialMoment:
        scores = [entry[self._job.train.metric] for entry in record.history]
        whole = record.done or len(scores) >= known.epochs
        return replace(
            known,
            epoch=len(scores),
            score=scores[-1] if scores else None,
            best=self._best(scores),
            seconds=record.seconds or known.seconds,
            states=record.prefix,
            status="failed" if record.failure else "done" if whole else "stopped",
            reason=record.failure.reason if record.failure else "",
        )
