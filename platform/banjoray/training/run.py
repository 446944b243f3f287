"""`train` and `score`: the loop on Ray's workers, then a score, a gate and the registry."""

import hashlib
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from banjoray.config.job import JobConfig, is_url, load_job
from banjoray.data.bad_rows import write_list
from banjoray.errors import BanjorayError, ClusterError, ConfigError, Stopped
from banjoray.garbage import collect_later
from banjoray.registry import Registry

with collect_later():
    import torch

    import ray
    from banjoray.tasks.task import Score
    from banjoray.training.checkpoints import Store
    from banjoray.training.export import export
    from banjoray.training.interface import FitResult
    from banjoray.training.local_ray import QUIET, environment
    from banjoray.training.preflight import Ready, prepare
    from banjoray.training.registering import gate_and_register
    from banjoray.training.runs import Run, claim_run
    from banjoray.training.scoring import score_folder
    from banjoray.training.signals import kept_sigterm
    from banjoray.training.workers import STAY, Watch, fit_on_ray

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
        if listed := write_list(ready.splits.left_out, run.url):
            say(f"all bad rows  {listed}")
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


def score(
    reference: str,
    split: str = "test",
    registry: str = "./registry",
    skip_bad_rows: bool = False,
    say: Say = lambda line: None,
) -> ScoreResult:
    """Load a registered version afresh and compute its score on a split of the data it was trained on.

    Of a task whose answers are texts, it writes one for every row, and the score has the metrics of these too. Rows
    that can't be used are left out with ``skip_bad_rows``, and where the version's job says so; ``say`` tells of them.
    Raises RegistryError, BrokenVersion, DataError.
    """
    store = Registry(registry)
    version = store.resolve(reference)
    folder = store.fetch(version)
    job = load_job(folder / "job.yaml")
    if skip_bad_rows:
        job = job.with_values({"data.skip_bad_rows": True})
    found, fingerprint = score_folder(folder, job, split, texts=True, say=say)
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
    runtime_env = {"env_vars": worker_environment(job)}
    with kept_sigterm(), environment(QUIET if here else {}):
        ray.init(runtime_env=runtime_env, log_to_driver=False, logging_level=logging.ERROR, **options)
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
    # On a machine with GPUs, DeepSpeed would take them for a CPU run too. OpenMP's threads wait for each other by
    # spinning, 300,000 times unless told: where any other process wants a core, that costs ten times what it takes.
    device = {} if job.scale.gpus_per_worker else {"DS_ACCELERATOR": "cpu", "GOMP_SPINCOUNT": "10000"}
    # How long Tune waits for a stopped trial to close its trackers; after the 2 s that it waits unless told, it gives
    # up the next trial too.
    trials = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "600"}
    return job.hub.environment() | device | trials | {"TOKENIZERS_PARALLELISM": "false", STAY: "0"}


def _check_room(job: JobConfig) -> None:
    if short := _missing(job):
        raise ConfigError(f"{short}. Lower scale.workers or what each needs, or use a Ray cluster.")


def _missing(job: JobConfig) -> str | None:
    """What the job needs more than Ray has, in words; None if it fits."""
    have = ray.cluster_resources()
    for kind, each in (("CPU", job.scale.cpus_per_worker), ("GPU", job.scale.gpus_per_worker)):
        least = job.scale.least_workers
        needed = each * least
        if needed > have.get(kind, 0):
            place = "this machine has" if "RAY_ADDRESS" not in os.environ else "the cluster has"
            return (
                f"scale: {job.scale.least_workers} workers x {each} {kind} need {needed}, {place} {have.get(kind, 0):g}"
            )
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


def best_folder(run: str, job: JobConfig, ready: Ready, result: FitResult) -> Path:
    """The whole model of a run's best checkpoint as a Hugging Face folder on this machine, made now."""
    files = Store(run, lambda line: None).local(result.checkpoint)
    folder = Path(tempfile.mkdtemp(prefix="banjoray-model-")) / "model" if is_url(run) else Path(run) / "model"
    export(job, ready.start.model(), ready.start.tokenizer, result.checkpoint, files, folder)
    return folder


def rescored(job: JobConfig) -> Callable[[Path], Score]:
    """Loads a folder afresh and scores it on the validation rows: here, if a worker would run here; else in one."""
    # What a registry behind a URL holds was copied to this machine alone.
    here = is_url(job.registry.root) or _same_machine(job)
    return lambda folder: _score_afresh(folder, job) if here else _score_on_ray(folder, job)


def _same_machine(job: JobConfig) -> bool:
    """Whether a worker would run on this machine's cores: then a process of its own would only import all again."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) != 1 or job.scale.gpus_per_worker:
        return False
    here = nodes[0]["NodeManagerHostname"] == socket.gethostname()
    return bool(here and nodes[0]["Resources"].get("CPU", 0) >= job.scale.cpus_per_worker)


def _score_afresh(folder: Path, job: JobConfig) -> Score:
    """The folder's score on the validation rows, with as many threads as a worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(job.scale.cpus_per_worker)
    try:
        return score_folder(folder, job, "validation")[0]
    finally:
        torch.set_num_threads(threads)


def _score_on_ray(folder: Path, job: JobConfig) -> Score:
    """Score where a worker would run: the driver may sit on a node without its memory, cores or GPU."""

    def work() -> Score:
        return _score_afresh(folder, job)

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
