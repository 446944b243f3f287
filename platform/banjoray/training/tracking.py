"""Who is told while a run trains: tensorboard files, an MLflow server, Weights & Biases.

Each has a thread of its own with a queue before it, so that a slow server costs the run nothing; one that fails is
named once, and the run goes on without it. Values of steps are called ``train/...``, those of epochs ``epoch/...``.
A run that goes on from a checkpoint goes on with the same curves.
"""

import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from banjoray.config.job import JobConfig
from banjoray.errors import ConfigError
from banjoray.training.interface import Callbacks, Moment
from banjoray.training.trackers import MLflow, TensorBoard, Told, Tracker, WandB

# What each kind needs: the module that is imported, which is also what pip installs.
MODULES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
MLFLOW_URI = "MLFLOW_TRACKING_URI"
# How long the end of a run waits for its trackers.
PATIENCE_S = 60.0


def check_trackers(kinds: Sequence[str]) -> None:
    """Raise ConfigError if a tracker can't work here: not installed, or MLflow without a server's address."""
    for kind in kinds:
        found = importlib.util.find_spec(MODULES[kind])
        # wandb makes a folder of its own name where it runs; that is importable, and has no origin.
        if found is None or found.origin is None:
            raise ConfigError(
                f"tracking: '{kind}' is not installed; pip install {MODULES[kind]}, or take it out of tracking"
            )
    if "mlflow" in kinds and not os.environ.get(MLFLOW_URI):
        raise ConfigError(
            f"tracking: 'mlflow' needs the environment variable {MLFLOW_URI}, found none; "
            "set it to the server's address, or take it out of tracking"
        )


def open_trackers(
    kinds: Sequence[str], folder: str, run: str, job: JobConfig, from_step: int, say: Callable[[str], None]
) -> "Trackers":
    """Trackers of the run called ``run``, to be opened on rank 0 only.

    ``folder`` is the run's, local or a URL. ``from_step`` steps are done: what an earlier attempt told of later ones
    is replaced or kept, not told twice. ``say`` gets a line if a tracker fails, in the thread that tells.
    """
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder, from_step),
        "mlflow": lambda: MLflow(folder, run, job),
        "wandb": lambda: WandB(folder, run, job),
    }
    return Trackers({kind: makers[kind] for kind in kinds}, say)


@contextmanager
def tracked(job: JobConfig, folder: str, callbacks: Callbacks) -> Iterator[Callbacks]:
    """``callbacks`` that tell the job's trackers too, while the block runs, of the run whose folder that is.

    They are opened with the first step that rank 0 tells of; a tracker that fails is named in the notes of moments.
    """
    opened: list[Trackers] = []
    notes: list[str] = []

    def opened_from(step: int) -> None:
        if not opened and job.tracking:
            run = folder.rstrip("/").rsplit("/", 1)[-1]
            opened.append(open_trackers(job.tracking, folder, run, job, step, notes.append))

    def watch(moment: Moment) -> None:
        opened_from(moment.step - 1)
        for trackers in opened:
            names = ("loss", "learning_rate", "gradient_norm", "rows_per_s", "padding")
            trackers.step(moment.step, {name: getattr(moment, name) for name in names})
        callbacks.watch(replace(moment, note="; ".join(filter(None, [moment.note, *notes]))))

    def scored(step: int, metrics: dict[str, float]) -> None:
        opened_from(step)
        for trackers in opened:
            trackers.epoch(step, metrics)
        callbacks.scored(step, metrics)

    failed = True
    try:
        yield replace(callbacks, watch=watch, scored=scored)
        failed = False
    finally:
        for trackers in opened:
            trackers.close(failed)


class Trackers:
    """Tells every tracker of a run; returns at once. ``close`` it, also when the run fails."""

    def __init__(self, makers: "Mapping[str, Callable[[], Tracker]]", say: Callable[[str], None]) -> None:
        self._say = say
        self._channels = [_Channel(kind, make) for kind, make in makers.items()]

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Tell the values of an optimizer step, the ``step``-th of the run."""
        self._tell(Told("train", step, dict(values), time.time()))

    def epoch(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell the metrics of an epoch that ended with a step; what was told so far is written out."""
        self._tell(Told("epoch", step, dict(metrics), time.time()))

    def close(self, failed: bool = False) -> None:
        """Write out everything and end, waiting a minute at most; ``failed`` marks the run so where that is shown."""
        for channel in self._channels:
            channel.send(_End(failed))
        until = time.monotonic() + PATIENCE_S
        for channel in self._channels:
            channel.wait(until)
        self._pass_on()
        self._channels = []

    def _tell(self, told: "Told") -> None:
        for channel in self._channels:
            channel.send(told)
        self._pass_on()

    def _pass_on(self) -> None:
        """Say here what the threads have to say: who is told may not expect another thread."""
        for channel in self._channels:
            while channel.notes:
                self._say(channel.notes.pop(0))


@dataclass(frozen=True)
class _End:
    failed: bool


class _Channel:
    """One tracker, its queue and its thread; ends when the tracker fails, with a note."""

    def __init__(self, kind: str, make: Callable[[], Tracker]) -> None:
        self.notes: list[str] = []
        self._kind, self._make = kind, make
        self._queue: queue.SimpleQueue[Told | _End] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracking-{kind}", daemon=True)
        self._thread.start()

    def send(self, message: "Told | _End") -> None:
        if self._thread.is_alive():
            self._queue.put(message)

    def wait(self, until: float) -> None:
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self.notes.append(f"tracking: {self._kind} did not take everything in {PATIENCE_S:.0f} s; the rest is lost")

    def _work(self) -> None:
        try:
            tracker = self._make()
            self.notes.extend(f"tracking: {note}" for note in tracker.notes)
            tracker.close(self._pass_on(tracker))
        except Exception as error:  # noqa: BLE001  a server that is away is no reason to lose a run
            reason = (str(error).splitlines() or [""])[0][:300]
            self.notes.append(
                f"tracking: {self._kind} failed ({type(error).__name__}: {reason}); the run goes on without it"
            )

    def _pass_on(self, tracker: Tracker) -> bool:
        """Tell the tracker until the end of the run; whether it failed."""
        flushed, waiting = time.monotonic(), False
        while True:
            due = None
            if waiting and tracker.every_s is not None:
                due = max(0.0, flushed + tracker.every_s - time.monotonic())
            try:
                message = self._queue.get(timeout=due)
            except queue.Empty:
                message = None
            if isinstance(message, _End):
                return message.failed
            if message is not None:
                tracker.tell(message)
                waiting = True
            if message is None or message.kind == "epoch" or due == 0:
                tracker.flush()
                flushed, waiting = time.monotonic(), False
