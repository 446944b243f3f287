"""`train` and `score`: the loop on Ray Train workers, then a score, a gate and the registry."""

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch

import ray
from banjoray.config.job import JobConfig, is_url, load_job
from banjoray.errors import BanjorayError, BrokenVersion, ClusterError, ConfigError, GateRefused, TrainingFailed
from banjoray.registry import ModelVersion, Registry
from banjoray.tasks.task import Score
from banjoray.training.checkpoints import Store
from banjoray.training.loop import Callbacks, FitResult, Moment, fit
from banjoray.training.preflight import Ready, prepare
from banjoray.training.runs import Run, claim_run
from banjoray.training.scoring import score_folder
from banjoray.training.signals import kept_sigterm

# A registered folder, loaded afresh, may differ from the run's own measurement by this much in any metric:
# another batch shape rounds differently, which can turn a row that sits on the fence.
TOLERANCE = 2e-3

# Ray Train (in the driver) and Ray Tune (in a trial) read this: "0" leaves a worker in the working directory of the
# job, so that a relative path means the same there as in the driver.
STAY = "RAY_CHDIR_TO_TRIAL_DIR"

Watch = Callable[[Moment], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    ``checkpoint`` is a Hugging Face folder (the best one); ``version`` its name in the registry, as emotion@3;
    ``metrics`` are on the validation rows; ``seconds`` and ``rows_per_s`` are of the training loop.
    """

    run_id: str
    checkpoint: str
    version: str
    metrics: dict[str, float]
    steps: int
    seconds: float
    rows_per_s: float
    config: JobConfig

    def to_json(self) -> dict[str, Any]:
        """The result as plain values; the config stays in ``<checkpoint>/job.yaml``."""
        return {key: value for key, value in vars(self).items() if key != "config"}


@dataclass(frozen=True)
class ScoreResult:
    """A version's score on a split; ``same_data`` says whether the rows are those it was trained beside."""

    version: str
    split: str
    score: Score
    same_data: bool

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return {"version": self.version, "split": self.split, "same_data": self.same_data} | self.score.to_json()


def train(job: JobConfig, watch: Watch = lambda moment: None, say: Say = lambda line: None) -> RunResult:
    """Run a job to its end: train on Ray workers, score, pass the gate, register.

    The same job started again goes on with its unfinished run. ``watch`` sees every few steps, ``say`` gets lines.
    Raises ConfigError, DataError, ModelError before anything starts; TrainingFailed; GateRefused (the checkpoint is
    kept, nothing is registered); BrokenVersion if the registered folder does not score what the run measured.
    """
    written, job = job, job.anchored(Path.cwd())
    ready = prepare(job)
    stem = f"{job.name}-{_identity(written, ready)}"
    for warning in ready.warnings:
        say(warning)
    with cluster(job, say), claim_run(job, stem) as run:
        say(_opening(job, ready, run))
        result = fit_on_ray(job, run.url, watch)
        checkpoint = best_folder(run.url, result)
        registered = gate_and_register(job, ready, checkpoint, result, {"run": run.id, "trial": None})
        finished = RunResult(
            run.id,
            str(checkpoint),
            str(registered),
            dict(registered.metrics),
            result.steps,
            round(result.seconds, 3),
            round(result.rows_per_s, 2),
            job,
        )
        run.finish(finished.to_json())
    return finished


def _identity(written: JobConfig, ready: Ready) -> str:
    """8 hex digits that are equal for runs that would learn the same: an unfinished one goes on only then.

    By the job as it was written: on a cluster, the working directory is another folder after every change in it.
    """
    facts = written.training_digest() + ready.fingerprint + ready.base.digest
    return hashlib.sha256(facts.encode()).hexdigest()[:8]


def score(reference: str, split: str = "test", registry: str = "./registry") -> ScoreResult:
    """Load a registered version afresh and compute its score on a split of the data it was trained on.

    Raises RegistryError, BrokenVersion, DataError.
    """
    store = Registry(registry)
    version = store.resolve(reference)
    folder = store.fetch(version)
    job = load_job(folder / "job.yaml")
    found, fingerprint = score_folder(folder, job, split)
    return ScoreResult(str(version), split, found, fingerprint == version.lineage["data"])


@contextmanager
def cluster(job: JobConfig, say: Say) -> Iterator[None]:
    """Ray, connected: the cluster of RAY_ADDRESS (Ray sets it inside a Ray job), else one on this machine.

    A cluster started here is stopped at the end. Raises ConfigError if this machine is too small for the job.
    """
    if ray.is_initialized():
        if short := _missing(job):
            say(f"{short}; waiting until they are there")
        yield
        return
    here = "RAY_ADDRESS" not in os.environ
    # "local": without it, ray.init joins whatever Ray was last started on this machine.
    options: dict[str, Any] = {"address": "local", "include_dashboard": False} if here else {}
    environment = {"env_vars": worker_environment(job)}
    with kept_sigterm():
        ray.init(runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR, **options)
    try:
        if here:
            _check_room(job)
        elif short := _missing(job):
            say(f"{short} now; waiting until they are there, as an autoscaling cluster adds them")
        yield
    finally:
        ray.shutdown()


def worker_environment(job: JobConfig) -> dict[str, str]:
    """What must be in a worker's environment before it imports anything: the hub's address, DeepSpeed's device."""
    # On a machine with GPUs, DeepSpeed would take them for a CPU run too.
    device = {} if job.scale.gpus_per_worker else {"DS_ACCELERATOR": "cpu"}
    return job.hub.environment() | device | {"TOKENIZERS_PARALLELISM": "false", STAY: "0"}


def _check_room(job: JobConfig) -> None:
    if short := _missing(job):
        raise ConfigError(f"{short}. Lower scale.workers or what each needs, or use a Ray cluster.")


def _missing(job: JobConfig) -> str | None:
    """What the job needs more than Ray has, in words; None if it fits."""
    have = ray.cluster_resources()
    for kind, each in (("CPU", job.scale.cpus_per_worker), ("GPU", job.scale.gpus_per_worker)):
        needed = each * job.scale.workers
        if needed > have.get(kind, 0):
            place = "this machine has" if "RAY_ADDRESS" not in os.environ else "the cluster has"
            return f"scale: {job.scale.workers} workers x {each} {kind} need {needed}, {place} {have.get(kind, 0):g}"
    return None


def _opening(job: JobConfig, ready: Ready, run: Run) -> str:
    splits = ready.splits
    verb = "continuing" if run.resumed else "starting"
    share = f", {ready.trainable / ready.weights:.0%} trained" if ready.trainable < ready.weights else ""
    return (
        f"{verb} run {run.id}: {len(splits.train)} train and {len(splits.validation)} validation rows, "
        f"{len(splits.labels)} labels, {job.model.base} ({ready.weights / 1e6:.1f} M weights{share}), "
        f"{job.scale.workers} worker{'s' * (job.scale.workers > 1)}, {job.scale.strategy}"
    )


@ray.remote(num_cpus=0)
class _Board:
    """Where rank 0 writes how far it is, and the driver reads it."""

    def __init__(self) -> None:
        self._latest: Moment | None = None

    def put(self, moment: Moment) -> None:
        self._latest = moment

    def latest(self) -> Moment | None:
        return self._latest


def _work(settings: dict[str, Any]) -> FitResult:
    """What every Ray Train worker runs."""
    import torch

    job: JobConfig = settings["job"]
    torch.set_num_threads(job.scale.cpus_per_worker)
    ready = prepare(job)
    board, sent = settings["board"], [0.0]

    def watch(moment: Moment) -> None:
        import time

        if time.monotonic() - sent[0] > 0.3 or moment.step == moment.steps:
            board.put.remote(moment)
            sent[0] = time.monotonic()

    callbacks = Callbacks(report=ray.train.report, watch=watch)
    return fit(job, ready.rows, ready.task, ready.start, settings["run"], callbacks)


def fit_on_ray(job: JobConfig, run: str, watch: Watch, callbacks: Sequence[Any] = ()) -> FitResult:
    """The loop on Ray Train, in folder ``run``; a dead worker restarts all of them from the newest checkpoint.

    ``callbacks`` are Ray Train's. Raises TrainingFailed when every retry is used up.
    """
    # Ray Train's controller takes reports in this often, 2 s unless told, and workers wait for it after every epoch.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ[STAY] = "0"
    board = _Board.remote()  # type: ignore[attr-defined]
    scale = job.scale
    # Typed for functions that return nothing; what rank 0 returns is in Result.return_value.
    worker: Any = _work
    trainer = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config={"job": job, "run": run, "board": board},
        scaling_config=ray.train.ScalingConfig(
            num_workers=scale.workers,
            use_gpu=scale.gpus_per_worker > 0,
            resources_per_worker={"CPU": scale.cpus_per_worker} | ({"GPU": 1} if scale.gpus_per_worker else {}),
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=run,
            callbacks=list(callbacks),
            failure_config=ray.train.FailureConfig(max_failures=scale.max_failures),
        ),
    )
    try:
        with _watching(board, watch):
            result: Any = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error, run) from error
    found: FitResult = result.return_value
    return found


@contextmanager
def _watching(board: Any, watch: Watch) -> Iterator[None]:
    """Show what is on the board while the block runs."""
    done = threading.Event()

    def poll() -> None:
        seen: Moment | None = None
        while not done.wait(0.3):
            latest = ray.get(board.latest.remote())
            if latest is not None and latest != seen:
                watch(latest)
                seen = latest

    thread = threading.Thread(target=poll, name="banjoray-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _cause(error: Exception, run: str) -> BanjorayError:
    """What a worker said as one of our errors; else the first worker's failure, as one.

    When one worker fails, the others fail too, with a lost connection; so ours are looked for on all of them first.
    """
    # Ray Train wraps what a worker raised, to keep its traceback.
    failures = {rank: getattr(e, "_base_exc", e) for rank, e in sorted(getattr(error, "worker_failures", {}).items())}
    for failure in failures.values():
        if isinstance(failure, BanjorayError):
            return failure
    for rank, failure in failures.items():
        reason = str(failure).strip().splitlines()[-1] if str(failure).strip() else type(failure).__name__
        return TrainingFailed(f"worker {rank} failed: {reason}. Checkpoints so far: {run}/checkpoints")
    return TrainingFailed(f"training failed: {error}")


def best_folder(run: str, result: FitResult) -> Path:
    """The Hugging Face folder of a run's best checkpoint, on this machine."""
    return Store(run, lambda line: None).local(result.checkpoint) / "model"


def gate_and_register(
    job: JobConfig, ready: Ready, checkpoint: Path, result: FitResult, origin: Mapping[str, str | None]
) -> ModelVersion:
    """A registered version of a checkpoint that passes the gate and scores afresh what the run measured."""
    gate, measured = job.registry.gate, result.checkpoint.metrics
    if measured[gate.metric] < gate.at_least:
        raise GateRefused(
            f"registry.gate: {gate.metric} is {measured[gate.metric]:.4f}, needed at least {gate.at_least}; "
            f"not registered. The checkpoint stays in {checkpoint}."
        )

    def verify(folder: Path) -> dict[str, float]:
        # What a registry behind a URL holds was copied to this machine alone, so it is scored in this process.
        scored = score_folder(folder, job, "validation")[0] if is_url(job.registry.root) else _score_on_ray(folder, job)
        for metric, value in measured.items():
            if abs(scored.metrics[metric] - value) > TOLERANCE:
                raise BrokenVersion(
                    f"{folder} scores {metric} {scored.metrics[metric]:.5f} when loaded afresh, the run measured "
                    f"{value:.5f}; not registered"
                )
        return scored.metrics

    return Registry(job.registry.root).register(
        job.model_name,
        checkpoint,
        task=job.task,
        labels=ready.splits.labels,
        lineage=dict(origin)
        | {
            "data": ready.fingerprint,
            "base": job.model.base,
            "base_digest": ready.base.digest,
            "job": job.digest(),
            "code": f"banjoray {installed('banjoray')}",
            "precision": result.precision,
        },
        verify=verify,
    )


def _score_on_ray(folder: Path, job: JobConfig) -> Score:
    """Score where a worker would run: the driver may sit on a node without its memory, cores or GPU."""

    def work() -> Score:
        import torch

        torch.set_num_threads(job.scale.cpus_per_worker)
        return score_folder(folder, job, "validation")[0]

    remote = ray.remote(num_cpus=job.scale.cpus_per_worker, num_gpus=job.scale.gpus_per_worker)(work)
    try:
        found: Score = ray.get(remote.remote())
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BanjorayError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"the process that re-scores the checkpoint died ({error}); the checkpoint is kept"
        ) from None
    return found
