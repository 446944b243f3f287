"""The loop on Ray, in one worker alone or in a group; what every worker does, and the one that is alone."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol

import ray
from banjoray.config.job import JobConfig
from banjoray.errors import BanjorayError, TrainingFailed
from banjoray.garbage import collect_later

with collect_later():
    import torch

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


class Board:
    """Between rank 0 and the driver: how far the run is, and whether it has to end."""

    def __init__(self) -> None:
        self._latest: Moment | None = None
        self._stop = False

    def put(self, moment: Moment) -> bool:
        """Take what rank 0 says; whether it has to end."""
        self._latest = moment
        return self._stop

    def latest(self) -> Moment | None:
        """What rank 0 said last."""
        return self._latest

    def stop(self) -> None:
        """The run has to end."""
        self._stop = True

    def stopping(self) -> bool:
        """Whether the run has to end."""
        return self._stop


class Ear(Protocol):
    """Where a worker says how far it is, and hears whether it has to end."""

    def put(self, moment: Moment) -> object:
        """Say how far the run is."""

    def stopping(self) -> bool:
        """Whether the run has to end."""
        ...


def work(job: JobConfig, run: str, board: Ear, exact: bool, report: Report | None = None) -> FitResult:
    """What every worker does: the loop, until its end, the driver's wish on the board or a SIGTERM of its own."""
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
        # Ray Train takes a second to import, in the driver and in every worker; who is alone needs none of it.
        from banjoray.training.group import fit_in_group

        return fit_in_group(job, run, watch, callbacks, exact)
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
        board = Board()
        self._ended = self._pool.submit(work, job, run, board, exact)
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
                reason = last_line(error)
            except ray.exceptions.RayError as error:
                # Its process or node is gone.
                reason = last_line(error)
            finally:
                ray.kill(worker)
            failures += 1
            if failures > scale.max_failures:
                raise TrainingFailed(f"the worker failed: {reason}. Checkpoints so far: {run}/checkpoints")


def last_line(error: Exception) -> str:
    """The end of what an error says, which of one that crossed processes is its cause."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
