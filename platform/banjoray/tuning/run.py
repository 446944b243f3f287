"""`tune`: a search on Ray Tune in which every trial is one run, and the best one becomes a version."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from banjoray.config.job import JobConfig
from banjoray.config.search import Dimension
from banjoray.data.bad_rows import lines_about, write_list
from banjoray.errors import TrainingFailed
from banjoray.garbage import collect_later

with collect_later():
    from optuna.samplers import TPESampler
    from ray.tune.integration.ray_train import TuneReportCallback
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule
    from ray.tune.search.basic_variant import BasicVariantGenerator
    from ray.tune.search.optuna import OptunaSearch

    import ray
    from banjoray.training.checkpoints import Checkpoint, Store
    from banjoray.training.compatibility import check
    from banjoray.training.interface import Callbacks, FitResult, Moment
    from banjoray.training.loop import fit
    from banjoray.training.preflight import prepare
    from banjoray.training.registering import gate_and_register
    from banjoray.training.run import best_folder, cluster, rescored
    from banjoray.training.runs import Run, claim_run
    from banjoray.training.strategies import choose_precision
    from banjoray.training.tracking import tracked
    from banjoray.training.workers import fit_on_ray, needs_group
    from banjoray.tuning.disk import Janitor, shared
    from banjoray.tuning.driver import Driver, folder_of
    from banjoray.tuning.importance import importances
    from banjoray.tuning.record import recorded
    from banjoray.tuning.space import STRUCTURAL, at_once, corner_jobs, search_of, told_values
    from banjoray.tuning.study import StudyResult, Trial, Watch, in_lines
    from banjoray.tuning.trial import Report, history_of, run_trial
    from ray import tune as ray_tune

Say = Callable[[str], None]
# After a trial's name in Tune's own record. A driver that was killed may have begun trials that are not in it: their
# names are drawn once more, and Tune, which finds the folders, writes something behind (Ray 2.60).
RAYS = ".ray"


def tune(job: JobConfig, watch: Watch | None = None, say: Say = lambda line: None) -> StudyResult:
    """Search ``job.tune.space``, register the best run of all trials with its trial id.

    The same job started again goes on with its unfinished study: finished trials are not run again, others go on from
    their checkpoints. ``watch`` gets a `TrialMoment` whenever a trial begins, reports an epoch, or ends; without it,
    ``say`` gets a line per epoch of every trial. Raises ConfigError, DataError, ModelError before anything starts;
    TrainingFailed if no trial finished an epoch, or if one met a bug; GateRefused.
    """
    job = job.anchored(Path.cwd())
    search_of(job)
    left_out = prepare(job).splits.left_out
    for line in lines_about(left_out):
        say(line)
    for key, corner in corner_jobs(job):
        check(corner)
        if key.split(".")[0] in STRUCTURAL:
            prepare(corner)
    with cluster(job, say), claim_run(job, f"{job.name}-tune-{job.digest()[:8]}") as study:
        together = _at_once(job)
        drawn_from = shared(job, together)
        if drawn_from != job:
            prepare(drawn_from)
        janitor = Janitor(job, together)
        watch = watch or in_lines(say, job.train.metric)
        driver = Driver(drawn_from, study.url, watch, janitor, needs_group(job))
        say(_opening(drawn_from, study))
        if listed := write_list(left_out, study.url):
            say(f"all bad rows  {listed}")
        trials = _run_trials(drawn_from, study, driver)
        ranked = sorted(trials, key=lambda trial: _rank(trial, job))
        winner = ranked[0] if ranked else None
        if winner is None or winner.score is None:
            reason = f"the first ended with: {winner.status}" if winner else "none began; raise tune.time_budget_s"
            raise TrainingFailed(f"no trial of {study.id} finished an epoch; {reason}")
        version = _register(job, study, winner)
        finished = StudyResult(
            study.id,
            version,
            winner.trial,
            job.train.metric,
            job.train.mode,
            winner.score,
            tuple(ranked),
            importances(ranked, job.train.mode, job.train.seed),
            janitor.freed,
        )
        study.finish(finished.to_json())
    return finished


def _register(job: JobConfig, study: Run, winner: Trial) -> str:
    """The winner as a version: past the gate, re-scored, with its trial in the lineage."""
    won = _best(job, study, winner.trial)
    won_job = job.with_values(winner.values).anchored(Path.cwd())
    precision = choose_precision(won_job).precision
    result = FitResult(won, won.position.step, winner.seconds, 0.0, precision)
    ready = prepare(won_job)
    checkpoint = best_folder(_folder(study, winner.trial), won_job, ready, result)
    origin = {"run": study.id, "trial": winner.trial}
    return str(gate_and_register(won_job, ready, checkpoint, result, origin, rescored(won_job)))


def _rank(trial: Trial, job: JobConfig) -> tuple[bool, float]:
    sign = -1.0 if job.train.mode == "max" else 1.0
    return trial.score is None, sign * (trial.score or 0.0)


def _folder(study: Run, trial: str) -> str:
    return folder_of(study.url, trial)


def _best(job: JobConfig, study: Run, trial: str) -> Checkpoint:
    found = Store(_folder(study, trial), lambda line: None).best(job.train.metric, job.train.mode)
    if found is None:
        raise TrainingFailed(f"trial {trial} reported a score but kept no checkpoint in {_folder(study, trial)}")
    return found


# The study that this process drives; the callback, which Tune pickles with a study, looks it up here: a restored one
# has never seen this terminal.
_driving: list[Driver] = []


class _Told(ray_tune.Callback):
    """Passes on how trials begin, what they report, and how they end."""

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Called by Tune in the driver, again and again; of a study that goes on, some trials have ended before."""
        if not _driving[-1].opened:
            _driving[-1].open({one.trial_id: _values(one.config) for one in trials if one.status == "TERMINATED"})

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called by Tune in the driver."""
        _driving[-1].begun(trial.trial_id, _values(trial.config))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """Called by Tune in the driver."""
        _driving[-1].reported(trial.trial_id, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called by Tune in the driver."""
        _driving[-1].ended(trial.trial_id, [one.trial_id for one in trials if one.status == "TERMINATED"])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called by Tune in the driver: a trial whose process ended is started again."""
        _driving[-1].died(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called by Tune in the driver: a trial whose process ended once too often."""
        _driving[-1].died(trial.trial_id)


def _record(study: Run) -> str:
    """Where Tune keeps its own record of a study."""
    return f"{study.url}/ray"


def _opening(job: JobConfig, study: Run) -> str:
    search, known = search_of(job), ray_tune.Tuner.can_restore(_record(study))
    verb, keys = "continuing" if known else "starting", ", ".join(search.space)
    return f"{verb} study {study.id}: {search.points} trials over {keys}, {_at_once(job)} at a time"


def _run_trials(job: JobConfig, study: Run, driver: Driver) -> list[Trial]:
    # How old Tune's record of a study may be, in seconds; it takes 10 and more unless told.
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "1"
    # A trial whose losses are no numbers ends without a report, which Tune would take for a mistake in the program.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    record = _record(study)
    trainable = ray_tune.with_resources(_trial(job, study), _resources(job))
    known = ray_tune.Tuner.can_restore(record)
    tuner = ray_tune.Tuner.restore(record, trainable, resume_errored=True) if known else _tuner(job, study, trainable)
    _driving.append(driver)
    try:
        found = tuner.fit()
    except Exception as error:
        # Tune wraps what a callback raises.
        if driver.bug is not None:
            raise TrainingFailed(
                f"{driver.bug}; the study is stopped, and the same command goes on when that is mended"
            ) from error
        raise
    finally:
        _driving.pop()
    # A time budget leaves trials that never began: Tune has no values for them.
    told = [_told(job, study, found[number]) for number in range(len(found)) if found[number].config]
    driver.tidy(trial.trial for trial in told)
    return told


def _tuner(job: JobConfig, study: Run, trainable: Any) -> Any:
    search = search_of(job)
    return ray_tune.Tuner(
        trainable,
        # Drawn key by key: in an order that does not depend on how the file is written.
        param_space={key: _sampled(dimension, search.searcher) for key, dimension in sorted(search.space.items())},
        tune_config=ray_tune.TuneConfig(
            metric=job.train.metric,
            mode=job.train.mode,
            num_samples=1 if search.searcher == "grid" else search.points,
            scheduler=_scheduler(job),
            # Tune takes no notice of it for its own searcher (Ray 2.60), which has to be told itself.
            max_concurrent_trials=_at_once(job) if search.searcher == "optuna" else None,
            search_alg=_searcher(job),
            time_budget_s=search.time_budget_s,
            # A process that has loaded its libraries takes the next trial too.
            reuse_actors=not needs_group(job),
            trial_name_creator=lambda trial: str(trial.trial_id),
            trial_dirname_creator=lambda trial: f"{trial.trial_id}{RAYS}",
        ),
        run_config=ray_tune.RunConfig(
            name="ray",
            storage_path=study.url,
            verbose=0,
            callbacks=[_Told()],
            failure_config=ray_tune.FailureConfig(max_failures=job.scale.max_failures),
        ),
    )


def _scheduler(job: JobConfig) -> Any:
    match search_of(job).scheduler:
        case "asha":
            longest = max(job.train.epochs, *(corner.train.epochs for _, corner in corner_jobs(job)))
            return ASHAScheduler(time_attr="epoch", max_t=longest, grace_period=1, reduction_factor=3)
        case "median":
            return _Median(time_attr="epoch", grace_period=1, min_samples_required=2)
    return None


class _Median(MedianStoppingRule):
    """Tune's rule, which takes the last result of every trial for a score (Ray 2.60), also of one that has none."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Called by Tune in the driver."""
        if "epoch" in result:
            super().on_trial_complete(tune_controller, trial, result)


class _Optuna(OptunaSearch):
    """Tune's bridge to Optuna, told of whole trials only.

    Scores of epochs serve Optuna's pruners, which are not in use: the scheduler stops trials. A trial that goes on
    after a restart counts its reports from one again (Ray 2.60), which Optuna 5 warns of.
    """

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Called by Tune in the driver."""


def _searcher(job: JobConfig) -> Any:
    if search_of(job).searcher == "optuna":
        return _Optuna(sampler=TPESampler(seed=job.train.seed))
    return BasicVariantGenerator(max_concurrent=_at_once(job), random_state=job.train.seed)


def _trial(job: JobConfig, study: Run) -> Callable[[dict[str, Any]], None]:
    """What every trial runs: one training run in its own folder, reporting each epoch."""

    here = Path.cwd()

    def trial(config: dict[str, Any]) -> None:
        drawn = job.with_values(_values(config)).anchored(here)
        folder = _folder(study, ray_tune.get_context().get_trial_id())
        run_trial(drawn, folder, ray_tune.report, _in_group if needs_group(job) else _alone)

    return trial


def _alone(job: JobConfig, folder: str, report: Report, watch: Callable[[Moment], None]) -> None:
    import torch

    torch.set_num_threads(job.scale.cpus_per_worker)
    ready = prepare(job)
    with tracked(job, folder, Callbacks(report=report, watch=watch)) as callbacks:
        fit(job, ready.rows, ready.task, ready.start, folder, callbacks)


def _in_group(job: JobConfig, folder: str, report: Report, watch: Callable[[Moment], None]) -> None:  # noqa: ARG001
    # Its workers report to Ray Train's controller, which hands it on to Tune.
    fit_on_ray(job, folder, watch, [TuneReportCallback()])


def _resources(job: JobConfig) -> dict[str, float]:
    """What Tune reserves for a trial; a worker group reserves its own CPUs, which the trial must not take from it."""
    if needs_group(job):
        # Bytes. Tune refuses a trial that asks for nothing (Ray 2.60).
        return {"memory": 2**20}
    return {"CPU": job.scale.cpus_per_worker, "GPU": job.scale.gpus_per_worker}


def _at_once(job: JobConfig) -> int:
    have = ray.cluster_resources()
    return at_once(job, int(have.get("CPU", 1)), int(have.get("GPU", 0)))


def _sampled(dimension: Dimension, searcher: str) -> Any:
    if dimension.loguniform:
        return ray_tune.loguniform(*dimension.loguniform)
    if dimension.uniform:
        return ray_tune.uniform(*dimension.uniform)
    # As text: Tune would search inside a choice that is a section, and Optuna takes plain values alone.
    texts = [json.dumps(choice) for choice in dimension.choice or []]
    return ray_tune.grid_search(texts) if searcher == "grid" else ray_tune.choice(texts)


def _values(config: dict[str, Any]) -> dict[str, Any]:
    """What a trial tries, by the job's keys."""
    return {key: json.loads(value) if isinstance(value, str) else value for key, value in config.items()}


def _told(job: JobConfig, study: Run, result: Any) -> Trial:
    """What is known of a trial, with the best score it reached at any epoch."""
    name = Path(result.path).name.partition(RAYS)[0]
    values = told_values(job, _values(result.config))
    record, history = recorded(_folder(study, name)), history_of(_folder(study, name))
    scores = [entry[job.train.metric] for entry in history]
    best = (max if job.train.mode == "max" else min)(scores, default=None)
    status = "done"
    if record.failure is not None:
        status = record.failure.reason
    elif result.error is not None:
        status = str(result.error).strip().splitlines()[-1]
    elif len(scores) < job.with_values(values).train.epochs and not record.done:
        status = "stopped early"
    return Trial(name, values, status, len(scores), round(record.seconds, 3), best, history, record.prefix)
