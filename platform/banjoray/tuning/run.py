"""`tune`: a search on Ray Tune in which every trial is one run, and the best one becomes a version."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

import ray
from banjoray.config.job import JobConfig
from banjoray.config.search import Dimension
from banjoray.errors import TrainingFailed
from banjoray.training.checkpoints import Checkpoint, Store
from banjoray.training.compatibility import check
from banjoray.training.interface import Callbacks, FitResult
from banjoray.training.loop import fit
from banjoray.training.preflight import prepare
from banjoray.training.registering import gate_and_register
from banjoray.training.run import best_folder, cluster, rescored
from banjoray.training.runs import Run, claim_run
from banjoray.training.strategies import choose_precision
from banjoray.training.tracking import tracked
from banjoray.training.workers import fit_on_ray, needs_group
from banjoray.tuning.space import STRUCTURAL, corner_jobs, search_of
from ray import tune as ray_tune

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One point of the space: what it tried, how far it ran, and the best score it reached (None: it failed)."""

    trial: str
    values: dict[str, Any]
    status: str
    epochs: int
    seconds: float
    score: float | None

    def to_json(self) -> dict[str, Any]:
        """The trial as plain values."""
        return dict(vars(self))


@dataclass(frozen=True)
class StudyResult:
    """What a search leaves behind: the winner as a registered version, and every trial, best first."""

    study_id: str
    version: str
    trial: str
    metric: str
    score: float
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return vars(self) | {"trials": [trial.to_json() for trial in self.trials]}


def tune(job: JobConfig, say: Say = lambda line: None) -> StudyResult:
    """Search ``job.tune.space``, register the best run of all trials with its trial id.

    ``say`` gets a line per epoch of every trial. Raises ConfigError, DataError, ModelError before anything starts;
    TrainingFailed if no trial finished an epoch; GateRefused.
    """
    search, job = search_of(job), job.anchored(Path.cwd())
    prepare(job)
    for key, corner in corner_jobs(job):
        check(corner)
        if key.split(".")[0] in STRUCTURAL:
            prepare(corner)
    with cluster(job, say), claim_run(job, f"{job.name}-tune-{job.digest()[:8]}", resume=False) as study:
        keys, at_once = ", ".join(search.space), _at_once(job)
        say(f"starting study {study.id}: {search.trials} trials over {keys}, {at_once} at a time")
        trials = _run_trials(job, study, say)
        ranked = sorted(trials, key=lambda trial: _rank(trial, job))
        winner = ranked[0]
        if winner.score is None:
            raise TrainingFailed(f"no trial of {study.id} finished an epoch; the first failed with: {winner.status}")
        won = _best(job, study, winner.trial)
        won_job = job.with_values(winner.values).anchored(Path.cwd())
        precision = choose_precision(won_job).precision
        result = FitResult(won, won.position.step, winner.seconds, 0.0, precision)
        ready = prepare(won_job)
        checkpoint = best_folder(_folder(study, winner.trial), won_job, ready, result)
        origin = {"run": study.id, "trial": winner.trial}
        registered = gate_and_register(won_job, ready, checkpoint, result, origin, rescored(won_job))
        finished = StudyResult(study.id, str(registered), winner.trial, job.train.metric, winner.score, tuple(ranked))
        study.finish(finished.to_json())
    return finished


def _rank(trial: Trial, job: JobConfig) -> tuple[bool, float]:
    sign = -1.0 if job.train.mode == "max" else 1.0
    return trial.score is None, sign * (trial.score or 0.0)


def _folder(study: Run, trial: str) -> str:
    return f"{study.url}/trials/{trial}"


def _best(job: JobConfig, study: Run, trial: str) -> Checkpoint:
    found = Store(_folder(study, trial), lambda line: None).best(job.train.metric, job.train.mode)
    if found is None:
        raise TrainingFailed(f"trial {trial} reported a score but kept no checkpoint in {_folder(study, trial)}")
    return found


def _run_trials(job: JobConfig, study: Run, say: Say) -> list[Trial]:
    search = search_of(job)
    scheduler = None
    if search.scheduler == "asha":
        longest = max(job.train.epochs, *(corner.train.epochs for _, corner in corner_jobs(job)))
        scheduler = ASHAScheduler(max_t=longest, grace_period=1, reduction_factor=3)
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(_trial(job, study), _resources(job)),
        param_space={key: _sampled(dimension) for key, dimension in search.space.items()},
        tune_config=ray_tune.TuneConfig(
            metric=job.train.metric,
            mode=job.train.mode,
            num_samples=search.trials,
            scheduler=scheduler,
            max_concurrent_trials=_at_once(job),
            search_alg=BasicVariantGenerator(random_state=job.train.seed),
            trial_name_creator=lambda trial: str(trial.trial_id),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=ray_tune.RunConfig(name="ray", storage_path=study.url, verbose=0, callbacks=[_Told(job, say)]),
    )
    found = tuner.fit()
    return [_told(job, found[number]) for number in range(len(found))]


def _trial(job: JobConfig, study: Run) -> Callable[[dict[str, Any]], None]:
    """What every trial runs: one training run in its own folder, reporting each epoch."""

    here = Path.cwd()

    def trial(values: dict[str, Any]) -> None:
        drawn = job.with_values(values).anchored(here)
        folder = _folder(study, ray_tune.get_context().get_trial_id())
        if not needs_group(job):
            import torch

            torch.set_num_threads(job.scale.cpus_per_worker)
            ready = prepare(drawn)
            with tracked(drawn, folder, Callbacks(report=ray_tune.report)) as callbacks:
                fit(drawn, ready.rows, ready.task, ready.start, folder, callbacks)
        else:
            fit_on_ray(drawn, folder, lambda moment: None, [TuneReportCallback()])

    return trial


def _resources(job: JobConfig) -> dict[str, float]:
    """What Tune reserves for a trial; a worker group reserves its own CPUs, which the trial must not take from it."""
    if needs_group(job):
        # Bytes. Tune refuses a trial that asks for nothing (Ray 2.60).
        return {"memory": 2**20}
    return {"CPU": job.scale.cpus_per_worker, "GPU": job.scale.gpus_per_worker}


def _at_once(job: JobConfig) -> int:
    """How many trials run at the same time: as asked, but never more than fit, or worker groups would wait forever."""
    have, workers = ray.cluster_resources(), job.scale.least_workers
    fits = int(have.get("CPU", 1) // (workers * job.scale.cpus_per_worker))
    if job.scale.gpus_per_worker:
        fits = min(fits, int(have.get("GPU", 0) // (workers * job.scale.gpus_per_worker)))
    wanted = search_of(job).concurrent
    return max(1, fits if wanted == "auto" else min(wanted, fits))


def _sampled(dimension: Dimension) -> Any:
    if dimension.loguniform:
        return ray_tune.loguniform(*dimension.loguniform)
    if dimension.uniform:
        return ray_tune.uniform(*dimension.uniform)
    return ray_tune.choice(dimension.choice or [])


def _silent(line: str) -> None:
    """Say nothing."""


class _Told(ray_tune.Callback):
    """Passes on what trials report, a line per epoch."""

    def __init__(self, job: JobConfig, say: Say) -> None:
        self._metric, self._say = job.train.metric, say

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its callbacks with the study; where a line goes on this terminal can't be saved, nor is it needed.
        return {"_metric": self._metric, "_say": _silent}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """Called by Tune in the driver."""
        values = ", ".join(
            f"{key} {value:.2e}" if isinstance(value, float) else f"{key} {value}"
            for key, value in trial.config.items()
        )
        self._say(
            f"  trial {trial.trial_id}  epoch {result['epoch']}  {self._metric} {result[self._metric]:.4f}  ({values})"
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Called by Tune in the driver."""
        self._say(f"  trial {trial.trial_id}  failed")


def _told(job: JobConfig, result: Any) -> Trial:
    """What Tune knows of a trial, with the best score it reached at any epoch."""
    history = result.metrics_dataframe
    metrics = result.metrics or {}
    scores = history[job.train.metric] if history is not None and job.train.metric in history else []
    best = (max if job.train.mode == "max" else min)(scores) if len(scores) else None
    status = "done"
    if result.error is not None:
        status = str(result.error).strip().splitlines()[-1]
    elif len(scores) < job.with_values(result.config).train.epochs:
        status = "stopped early"
    name = metrics.get("trial_id") or Path(result.path).name
    seconds = float(metrics.get("time_total_s", 0.0))
    return Trial(name, dict(result.config), status, len(scores), seconds, None if best is None else float(best))
