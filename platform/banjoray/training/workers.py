"""The loop on Ray: in a group of Ray Train workers, or in one alone; what they tell the driver, and it tells them."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import ray.train
import ray.train.torch

import ray
from banjoray.config.job import JobConfig
from banjoray.errors import BanjorayError, TrainingFailed
from banjoray.training.interface import Callbacks, FitResult, Moment
from banjoray.training.loop import fit
from banjoray.training.preflight import prepare
from banjoray.training.signals import catch_sigterm, sigterm_is_a_wish
from banjoray.training.tracking import tracked

# Ray Train (in the driver) and Ray Tune (in a trial) read this: "0" leaves a worker in the working directory of the
# job, so that a relative path means the same there as in the driver.
STAY = "RAY_CHDIR_TO_TRIAL_DIR"

Watch = Callable[[Moment], None]
Report = Callable[[dict[str, float]], None]


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


def _work(job: JobConfig, run: str, board: _Board | _Line, exact: bool, report: Report | None = None) -> FitResult:
    """What every worker does: the loop, until its end, the driver's wish on the board or a SIGTERM of its own."""
    import torch

    torch.set_num_threads(job.scale.cpus_per_worker)
    ready = prepare(job)
    with sigterm_is_a_wish() as told:
        callbacks = Callbacks(
            report=report, watch=board.put, should_stop=lambda: told.is_set() or board.stopping(), exact=exact
        )
        with tracked(job, run, callbacks) as watched:
            return fit(job, ready.rows, ready.task, ready.start, run, watched)


def needs_group(job: JobConfig) -> bool:
    """Whether a run's workers have to find each other; a single plain one does not, whatever starts it.

    The seven idle processes of a group wake up a hundred times a second each: on two cores, that costs a tenth.
    """
    return job.scale.workers != 1 or job.scale.strategy != "ddp"


def fit_on_ray(job: JobConfig, run: str, watch: Watch, callbacks: Sequence[Any] = (), exact: bool = False) -> FitResult:
    """The loop on Ray, in folder ``run``; dead workers are started again and go on from the newest checkpoint.

    ``callbacks`` are Ray Train's. Raises TrainingFailed when every retry is used up.
    """
    if callbacks or needs_group(job):
        return _fit_in_group(job, run, watch, callbacks, exact)
    return _fit_alone(job, run, watch, exact)


@ray.remote
class _LoneWorker:
    """The worker of a run that has no other: `run` says how far it is, `result` what it left or what it failed of.

    One method at a time: with more, the main thread of an actor looks for signals 100 times a second (decision 0017).
    """

    def __init__(self) -> None:
        # Here is the main thread, where signals arrive; the loop runs in another.
        catch_sigterm()
        self._pool = ThreadPoolExecutor(1)

    def run(self, job: JobConfig, run: str, exact: bool) -> Iterator[Moment | None]:
        board = _Board()
        self._ended = self._pool.submit(_work, job, run, board, exact)
        seen: Moment | None = None
        try:
            # Says that it runs: what is cancelled before is never started.
            yield seen
            done = False
            while not done and not ray.get_runtime_context().is_canceled():
                done = bool(wait([self._ended], timeout=0.5).done)
                latest = board.latest()
                if latest is not None and latest != seen:
                    seen = latest
                    yield seen
        finally:
            # It has ended, or is to end: Ray also closes a generator that is cancelled while a moment is on its way.
            board.stop()

    def result(self) -> FitResult:
        return self._ended.result()


def _follow(stream: Any, watch: Watch, told: threading.Event) -> None:
    """Show what a lone worker says until it has ended, and pass a SIGTERM on as a wish."""
    runs = asked = False
    while True:
        if runs and told.is_set() and not asked:
            ray.cancel(stream)
            asked = True
        if not ray.wait([stream], timeout=0.5)[0]:
            continue
        try:
            moment = ray.get(next(stream))
        except (StopIteration, ray.exceptions.TaskCancelledError):
            return
        runs = True
        if moment is not None:
            watch(moment)


def _fit_alone(job: JobConfig, run: str, watch: Watch, exact: bool) -> FitResult:
    scale = job.scale
    options = {"num_cpus": scale.cpus_per_worker, "num_gpus": scale.gpus_per_worker}
    failures = 0
    with sigterm_is_a_wish() as told:
        while True:
            worker = _LoneWorker.options(**options).remote()  # type: ignore[attr-defined]
            try:
                _follow(worker.run.options(num_returns="streaming").remote(job, run, exact), watch, told)
                result: FitResult = ray.get(worker.result.remote())
                if told.is_set() or not result.stopped:
                    return result
                reason = "it got a SIGTERM"
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, BanjorayError):
                    raise error.cause from None
                reason = _last_line(error)
            except ray.exceptions.RayError as error:
                # Its process or node is gone.
                reason = _last_line(error)
            finally:
                ray.kill(worker)
            failures += 1
            if failures > scale.max_failures:
                raise TrainingFailed(f"the worker failed: {reason}. Checkpoints so far: {run}/checkpoints")


def _work_in_group(settings: dict[str, Any]) -> FitResult:
    """What every Ray Train worker runs."""
    board = settings["board"]
    # Nobody but Tune reads what is reported to Ray, and every report waits for its controller.
    report = ray.train.report if settings["reports"] else None
    result = _work(settings["job"], settings["run"], _Line(board), settings["exact"], report)
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


def _fit_in_group(job: JobConfig, run: str, watch: Watch, callbacks: Sequence[Any], exact: bool) -> FitResult:
    # Ray Train's controller takes reports in this often, 2 s unless told, and workers wait for it after every epoch;
    # without reports it only sees the end of the run later, and leaves the cores to the workers.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2" if callbacks else "1")
    os.environ[STAY] = "0"
    board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Board).remote()
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
        return TrainingFailed(f"worker {rank} failed: {_last_line(failure)}. Checkpoints so far: {run}/checkpoints")
    return TrainingFailed(f"training failed: {error}")


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
