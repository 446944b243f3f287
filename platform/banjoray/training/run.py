"""`train` and `score`: the loop on Ray Train workers, then a score, a gate and the registry."""

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch

import ray
from banjoray.config.job import JobConfig, is_url, load_job
from banjoray.errors import BanjorayError, ClusterError, ConfigError, Stopped, TrainingFailed
from banjoray.registry import Registry
from banjoray.tasks.task import Score
from banjoray.training.checkpoints import Store
from banjoray.training.export import export
from banjoray.training.interface import Callbacks, FitResult, Moment
from banjoray.training.loop import fit
from banjoray.training.preflight import Ready, prepare
from banjoray.training.registering import gate_and_register
from banjoray.training.runs import Run, claim_run
from banjoray.training.scoring import score_folder
from banjoray.training.signals import catch_sigterm, kept_sigterm, sigterm_is_a_wish
from banjoray.training.tracking import tracked

# Ray Train (in the driver) and Ray Tune (in a trial) read this: "0" leaves a worker in the working directory of the
# job, so that a relative path means the same there as in the driver.
STAY = "RAY_CHDIR_TO_TRIAL_DIR"

Watch = Callable[[Moment], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    ``checkpoint`` is a Hugging Face folder (the best one); ``version`` its name in the registry, as emotion@3;
    ``metrics`` are on the validation rows; ``seconds`` and ``rows_per_s`` are of the training loop; ``profile`` is
    phase -> seconds of the driver's preparations (``prepare``) and of rank 0's loop.
    """

    run_id: str
    checkpoint: str
    version: str
    metrics: dict[str, float]
    steps: int
    seconds: float
    rows_per_s: float
    profile: dict[str, float]
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


def train(
    job: JobConfig, watch: Watch = lambda moment: None, say: Say = lambda line: None, exact: bool = False
) -> RunResult:
    """Run a job to its end: train on Ray workers, score, pass the gate, register.

    The same job started again goes on with its unfinished run. ``watch`` sees every few steps, ``say`` gets lines;
    ``exact`` makes GPUs wait at every phase, for a profile that is right. Raises ConfigError, DataError, ModelError
    before anything starts; TrainingFailed; Stopped (after a SIGTERM, with a checkpoint); GateRefused (the model is
    kept, nothing is registered); BrokenVersion if the registered folder does not score what the run measured.
    """
    written, job = job, job.anchored(Path.cwd())
    began = time.perf_counter()
    ready = prepare(job)
    prepared = time.perf_counter() - began
    stem = f"{job.name}-{_identity(written, ready)}"
    for warning in ready.warnings:
        say(warning)
    with cluster(job, say), claim_run(job, stem) as run:
        say(_opening(job, ready, run))
        result = fit_on_ray(job, run.url, watch, exact=exact)
        if result.stopped:
            raise Stopped(
                f"run {run.id} was told to end and has a checkpoint of step {result.steps}; the same command goes on"
            )
        folder = best_folder(run.url, job, ready, result)
        origin = {"run": run.id, "trial": None}
        registered = gate_and_register(job, ready, folder, result, origin, rescored(job))
        finished = RunResult(
            run.id,
            str(folder),
            str(registered),
            dict(registered.metrics),
            result.steps,
            round(result.seconds, 3),
            round(result.rows_per_s, 2),
            {phase: round(seconds, 3) for phase, seconds in ({"prepare": prepared} | result.profile).items()},
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
        needed = each * job.scale.least_workers
        if needed > have.get(kind, 0):
            place = "this machine has" if "RAY_ADDRESS" not in os.environ else "the cluster has"
            return f"scale: {job.scale.least_workers} workers x {each} {kind} need {needed}, {place} {have.get(kind, 0):g}"
    return None


def _opening(job: JobConfig, ready: Ready, run: Run) -> str:
    splits = ready.splits
    verb = "continuing" if run.resumed else "starting"
    share = f", {ready.trainable / ready.weights:.0%} trained" if ready.trainable < ready.weights else ""
    return (
        f"{verb} run {run.id}: {len(splits.train)} train and {len(splits.validation)} validation rows, "
        f"{len(splits.labels)} labels, {job.model.base} ({ready.weights / 1e6:.1f} M weights{share}), "
        f"{_workers(job)}, {job.scale.strategy}"
    )


def _workers(job: JobConfig) -> str:
    least, most = job.scale.least_workers, job.scale.most_workers
    return f"{least} worker{'s' * (least > 1)}" if least == most else f"{least} to {most} workers"


@ray.remote(num_cpus=0)
class _Board:
    """Between rank 0 and the driver: how far the run is, and whether it has to end."""

    def __init__(self) -> None:
        self._latest: Moment | None = None
        self._stop = False

    def put(self, moment: Moment) -> bool:
        self._latest = moment
        return self._stop

    def latest(self) -> Moment | None:
        return self._latest

    def stop(self) -> None:
        self._stop = True

    def stopping(self) -> bool:
        return self._stop


class _Line:
    """A worker's end of the board; asks without waiting for the answer."""

    def __init__(self, board: Any) -> None:
        self._board, self._sent, self._answer, self._stop = board, 0.0, None, False

    def watch(self, moment: Moment) -> None:
        """Tell the driver, a few times a second."""
        if time.monotonic() - self._sent > 0.3 or moment.step == moment.steps:
            self._answer = self._board.put.remote(moment)
            self._sent = time.monotonic()

    def stopping(self) -> bool:
        """Whether the driver's last answer was that the run has to end."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop, self._answer = bool(ray.get(self._answer)), None
        return self._stop


def _work(settings: dict[str, Any]) -> FitResult:
    """What every Ray Train worker runs."""
    import torch

    job: JobConfig = settings["job"]
    torch.set_num_threads(job.scale.cpus_per_worker)
    ready = prepare(job)
    line = _Line(settings["board"])
    with sigterm_is_a_wish() as told:
        callbacks = Callbacks(
            # Nobody but Tune reads what is reported to Ray, and every report waits for its controller.
            report=ray.train.report if settings["reports"] else lambda metrics: None,
            watch=line.watch,
            should_stop=lambda: told.is_set() or line.stopping(),
            exact=settings["exact"],
        )
        with tracked(job, settings["run"], callbacks) as watched:
            result = fit(job, ready.rows, ready.task, ready.start, settings["run"], watched)
    if result.stopped and not ray.get(settings["board"].stopping.remote()):
        raise TrainingFailed(f"a worker got a SIGTERM; the checkpoint of step {result.steps} is kept")
    return result


class _Group(ray.train.torch.TorchConfig):  # type: ignore[misc]
    """Ray Train's process group, whose workers take a SIGTERM as a wish."""

    @property
    def backend_cls(self) -> Any:
        """Ray's own backend, and one call more in every worker."""
        return _Backend


class _Backend(ray.train.torch.TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        # Runs in the workers' main threads, where signals arrive; the loop runs in another.
        worker_group.execute(catch_sigterm)


def fit_on_ray(
    job: JobConfig, run: str, watch: Watch, callbacks: Sequence[Any] = (), exact: bool = False
) -> FitResult:
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
        train_loop_config={"job": job, "run": run, "board": board, "reports": bool(callbacks), "exact": exact},
        torch_config=_Group(timeout_s=scale.collective_timeout_s),
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
    """Show what is on the board while the block runs, and pass a SIGTERM on to the workers as a wish."""
    done = threading.Event()

    def poll(told: threading.Event) -> None:
        seen: Moment | None = None
        passed = False
        while not done.wait(0.3):
            if told.is_set() and not passed:
                board.stop.remote()
                passed = True
            latest = ray.get(board.latest.remote())
            if latest is not None and latest != seen:
                watch(latest)
                seen = latest

    with sigterm_is_a_wish() as told:
        thread = threading.Thread(target=poll, args=(told,), name="banjoray-watch", daemon=True)
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


def best_folder(run: str, job: JobConfig, ready: Ready, result: FitResult) -> Path:
    """The whole model of a run's best checkpoint as a Hugging Face folder on this machine, made now."""
    files = Store(run, lambda line: None).local(result.checkpoint)
    folder = Path(tempfile.mkdtemp(prefix="banjoray-model-")) / "model" if is_url(run) else Path(run) / "model"
    export(job, ready.start.model(), ready.start.tokenizer, result.checkpoint, files, folder)
    return folder


def rescored(job: JobConfig) -> Callable[[Path], Score]:
    """Loads a folder afresh and scores it on the validation rows, where a worker would run."""
    if is_url(job.registry.root):
        # What a registry behind a URL holds was copied to this machine alone, so it is scored in this process.
        return lambda folder: score_folder(folder, job, "validation")[0]
    return lambda folder: _score_on_ray(folder, job)


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
