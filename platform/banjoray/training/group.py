"""The loop in a group of Ray Train workers; what they tell the driver, and it tells them, goes by a board."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from banjoray.config.job import JobConfig
from banjoray.errors import BanjorayError, TrainingFailed
from banjoray.garbage import collect_later
from banjoray.training.interface import FitResult, Moment
from banjoray.training.signals import catch_sigterm, sigterm_is_a_wish
from banjoray.training.workers import STAY, Board, Watch, last_line, work

with collect_later():
    import ray.train
    import ray.train.torch

    import ray


class _Line:
    """A worker's end of a board in another process; asks without waiting for the answer."""

    def __init__(self, board: Any) -> None:
        self._board, self._sent, self._stop = board, 0.0, False
        self._answer: Any = None

    def put(self, moment: Moment) -> None:
        """Tell the driver, a few times a second."""
        if time.monotonic() - self._sent > 0.5 or moment.step == moment.steps:
            self._answer = self._board.put.remote(moment)
            self._sent = time.monotonic()

    def stopping(self) -> bool:
        """Whether the driver's last answer was that the run has to end."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop, self._answer = bool(ray.get(self._answer)), None
        return self._stop


class _Window:
    """The driver's end of a board: shows what is new on it, and passes a SIGTERM on as a wish."""

    def __init__(self, watch: Watch, told: threading.Event) -> None:
        self._watch, self._told = watch, told
        self._seen: Moment | None = None

    def look(self, board: Any) -> None:
        if self._told.is_set():
            board.stop.remote()
        latest = ray.get(board.latest.remote())
        if latest is not None and latest != self._seen:
            self._watch(latest)
            self._seen = latest


def _work_in_group(settings: dict[str, Any]) -> FitResult:
    """What every Ray Train worker runs."""
    board = settings["board"]
    # Nobody but Tune reads what is reported to Ray, and every report waits for its controller.
    report = ray.train.report if settings["reports"] else None
    result = work(settings["job"], settings["run"], _Line(board), settings["exact"], report)
    if result.stopped and not ray.get(board.stopping.remote()):
        raise TrainingFailed(f"a worker got a SIGTERM; the checkpoint of step {result.steps} is kept")
    return result


class _Group(ray.train.torch.TorchConfig):
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


def fit_in_group(job: JobConfig, run: str, watch: Watch, callbacks: Sequence[Any], exact: bool) -> FitResult:
    """The loop in as many workers as the job has; Ray Train starts them again. Raises as `fit_on_ray` does."""
    # Ray Train's controller takes reports in this often, 2 s unless told, and workers wait for it after every epoch;
    # without reports it only sees the end of the run later, and leaves the cores to the workers.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2" if callbacks else "1")
    os.environ[STAY] = "0"
    board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board).remote()
    scale = job.scale
    workers: Any = scale.workers
    # Typed for functions that return nothing; what rank 0 returns is in Result.return_value.
    worker: Any = _work_in_group
    trainer = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config={"job": job, "run": run, "board": board, "reports": bool(callbacks), "exact": exact},
        torch_config=_Group(timeout_s=scale.collective_timeout_s),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
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
    except ray.exceptions.RayActorError as error:
        raise TrainingFailed(
            f"the process that leads the workers, Ray Train's controller, has died; checkpoints so far: "
            f"{run}/checkpoints; the same command goes on"
        ) from error
    found: FitResult = result.return_value
    return found


@contextmanager
def _watching(board: Any, watch: Watch) -> Iterator[None]:
    """Look at the board while the block runs."""
    done = threading.Event()

    def poll(window: _Window) -> None:
        while not done.wait(0.5):
            window.look(board)

    with sigterm_is_a_wish() as told:
        thread = threading.Thread(target=poll, args=(_Window(watch, told),), name="banjoray-watch", daemon=True)
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
        return TrainingFailed(f"worker {rank} failed: {last_line(failure)}. Checkpoints so far: {run}/checkpoints")
    return TrainingFailed(f"training failed: {error}")
