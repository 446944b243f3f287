"""Who is told while a run trains: tensorboard files, an MLflow server, Weights & Biases.

Each has a thread of its own with a queue before it, so that a slow server costs the run nothing; one that fails is
named once, and the run goes on without it. Values of steps are called ``train/...``, those of epochs ``epoch/...``.
A run that goes on from a checkpoint goes on with the same curves.
"""

import importlib.util
import json
import os
import queue
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import fsspec

from banjoray.config.job import JobConfig, is_url
from banjoray.errors import ConfigError
from banjoray.training.interface import Callbacks, Moment

# What each kind needs: the module that is imported, which is also what pip installs.
MODULES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
MLFLOW_URI = "MLFLOW_TRACKING_URI"
# MLflow's limits: a parameter's characters, and parameters of one request.
VALUE_LIMIT, PARAMS_LIMIT = 6000, 100
MLFLOW_STEPS = 50
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
    makers: dict[str, Callable[[], _Tracker]] = {
        "tensorboard": lambda: _TensorBoard(folder, from_step),
        "mlflow": lambda: _MLflow(folder, run, job),
        "wandb": lambda: _WandB(folder, run, job),
    }
    return Trackers({kind: makers[kind] for kind in kinds}, say)


@contextmanager
def tracked(job: JobConfig, folder: str, callbacks: Callbacks) -> Iterator[Callbacks]:
    """``callbacks`` that tell the job's trackers too, while the block runs, of the run whose folder that is.

    They are opened with the first step that rank 0 tells of; a tracker that fails is named in the notes of moments.
    """
    opened: list[Trackers] = []
    notes: list[str] = []

    def watch(moment: Moment) -> None:
        if not opened and job.tracking:
            run = folder.rstrip("/").rsplit("/", 1)[-1]
            opened.append(open_trackers(job.tracking, folder, run, job, moment.step - 1, notes.append))
        for trackers in opened:
            names = ("loss", "learning_rate", "gradient_norm", "rows_per_s", "padding")
            trackers.step(moment.step, {name: getattr(moment, name) for name in names})
        callbacks.watch(replace(moment, note="; ".join([moment.note, *notes])))

    def scored(step: int, metrics: dict[str, float]) -> None:
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

    def __init__(self, makers: "Mapping[str, Callable[[], _Tracker]]", say: Callable[[str], None]) -> None:
        self._say = say
        self._channels = [_Channel(kind, make) for kind, make in makers.items()]

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Tell the values of an optimizer step, the ``step``-th of the run."""
        self._tell(_Told("train", step, dict(values), time.time()))

    def epoch(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell the metrics of an epoch that ended with a step; what was told so far is written out."""
        self._tell(_Told("epoch", step, dict(metrics), time.time()))

    def close(self, failed: bool = False) -> None:
        """Write out everything and end, waiting a minute at most; ``failed`` marks the run so where that is shown."""
        for channel in self._channels:
            channel.send(_End(failed))
        until = time.monotonic() + PATIENCE_S
        for channel in self._channels:
            channel.wait(until)
        self._pass_on()
        self._channels = []

    def _tell(self, told: "_Told") -> None:
        for channel in self._channels:
            channel.send(told)
        self._pass_on()

    def _pass_on(self) -> None:
        """Say here what the threads have to say: who is told may not expect another thread."""
        for channel in self._channels:
            while channel.notes:
                self._say(channel.notes.pop(0))


@dataclass(frozen=True)
class _Told:
    """Values of a step or an epoch; ``at`` is in seconds since 1970."""

    kind: str
    step: int
    values: Mapping[str, float]
    at: float

    def named(self) -> dict[str, float]:
        return {f"{self.kind}/{name}": float(value) for name, value in self.values.items()}


@dataclass(frozen=True)
class _End:
    failed: bool


class _Tracker(Protocol):
    """Who is told; all calls come from one thread. ``every_s``: how often ``flush`` is called between epochs."""

    every_s: float | None = None
    notes: tuple[str, ...] = ()

    def tell(self, told: _Told) -> None: ...

    def flush(self) -> None: ...

    def close(self, failed: bool) -> None: ...


class _Channel:
    """One tracker, its queue and its thread; ends when the tracker fails, with a note."""

    def __init__(self, kind: str, make: Callable[[], _Tracker]) -> None:
        self.notes: list[str] = []
        self._kind, self._make = kind, make
        self._queue: queue.SimpleQueue[_Told | _End] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracking-{kind}", daemon=True)
        self._thread.start()

    def send(self, message: "_Told | _End") -> None:
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

    def _pass_on(self, tracker: _Tracker) -> bool:
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


class _TensorBoard(_Tracker):
    """Event files in ``<folder>/tensorboard``; for a URL, written here and sent after every epoch."""

    def __init__(self, folder: str, from_step: int) -> None:
        # SummaryWriter queues and flushes as it likes; what is below it writes at once, 39 us a step instead of 285.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._url = f"{folder.rstrip('/')}/tensorboard" if is_url(folder) else None
        self.every_s = None if self._url else 5.0
        self._temporary = tempfile.TemporaryDirectory() if self._url else None
        local = Path(self._temporary.name if self._temporary else f"{folder.removeprefix('file://')}/tensorboard")
        local.mkdir(parents=True, exist_ok=True)
        # Without a name of its own, a second file of the same second would overwrite the first.
        self._writer = EventsWriter(str(local / "events"), f".{from_step:09d}.{secrets.token_hex(3)}")
        # What SummaryWriter calls purge_step: readers drop earlier events of this step and later ones.
        started = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=from_step + 1, session_log=started))
        self._local = local

    def tell(self, told: _Told) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in told.named().items()]
        self._writer.write_event(Event(wall_time=told.at, step=told.step, summary=Summary(value=values)))

    def flush(self) -> None:
        self._writer.flush()
        if self._url:
            _send(self._local, self._url)

    def close(self, failed: bool) -> None:
        self.flush()
        self._writer.close()
        if self._temporary:
            self._temporary.cleanup()


class _MLflow(_Tracker):
    """An MLflow run, found again by ``<folder>/mlflow.json``; address and credentials are in MLflow's own variables."""

    every_s = 10.0

    def __init__(self, folder: str, run: str, job: JobConfig) -> None:
        import mlflow

        self._client: Any = mlflow.MlflowClient()
        self._waiting: list[_Told] = []
        self._run = _kept(folder, "mlflow")
        if self._run:
            self._client.update_run(self._run, status="RUNNING")
        else:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or job.name
            made = self._client.create_run(mlflow.set_experiment(experiment).experiment_id, run_name=run)
            self._run = made.info.run_id
            _keep(folder, "mlflow", self._run)
            self._tell_job(job)
        self._done = {kind: self._last(kind) for kind in ("train", "epoch")}

    def _tell_job(self, job: JobConfig) -> None:
        from mlflow.entities import Param

        # The keys of class_weights are label names, which may have characters that MLflow refuses.
        params = [Param(re.sub(r"[^\w\-./ ]", "_", key), value[:VALUE_LIMIT]) for key, value in _flat(job.to_json())]
        for start in range(0, len(params), PARAMS_LIMIT):
            self._client.log_batch(self._run, params=params[start : start + PARAMS_LIMIT])

    def _last(self, kind: str) -> int:
        """The last step that the run holds values of: MLflow can't forget them, and would show them twice."""
        names = [name for name in self._client.get_run(self._run).data.metrics if name.startswith(f"{kind}/")]
        history = self._client.get_metric_history(self._run, names[0]) if names else []
        return max((one.step for one in history), default=0)

    def tell(self, told: _Told) -> None:
        if told.step > self._done[told.kind]:
            self._waiting.append(told)
        if len(self._waiting) >= MLFLOW_STEPS:
            self.flush()

    def flush(self) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(told.at * 1000), told.step)
            for told in self._waiting
            for name, value in told.named().items()
        ]
        self._waiting = []
        # At most a thousand of a request.
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run, metrics=metrics[start : start + 1000])

    def close(self, failed: bool) -> None:
        self.flush()
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class _WandB(_Tracker):
    """A run at Weights & Biases, found again by ``<folder>/wandb.json``; key and mode are in wandb's own variables."""

    def __init__(self, folder: str, run: str, job: JobConfig) -> None:
        import wandb

        self._url = f"{folder.rstrip('/')}/wandb" if is_url(folder) else None
        self._temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True) if self._url else None
        local = Path(self._temporary.name if self._temporary else folder.removeprefix("file://"))
        local.mkdir(parents=True, exist_ok=True)
        self._local = local / "wandb"
        # The run's name alone is used again where the folder of runs was emptied, or is another: wandb would go on
        # with the curves of a run that has nothing to do with this one.
        kept = _kept(folder, "wandb") or f"{run}-{secrets.token_hex(4)}"
        _keep(folder, "wandb", kept)
        self._run = wandb.init(
            id=kept,
            name=run,
            project=None if os.environ.get("WANDB_PROJECT") else job.name,
            resume="allow",
            config=job.to_json(),
            dir=str(local),
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        self._offline = self._run.offline
        self.notes = () if self._offline else (f"wandb shows the run at {self._run.url}",)
        # A resumed run's next step: wandb warns of every step before it, and ignores it.
        self._first = self._run.step

    def tell(self, told: _Told) -> None:
        if told.step >= self._first:
            self._run.log(told.named(), step=told.step)

    def flush(self) -> None:
        """Nothing to do: wandb sends by itself."""

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
        if self._offline:
            import wandb

            # Offline, finish comes back before its process has written the run (wandb 0.31); this waits for it.
            wandb.teardown()
            if self._url:
                _send(self._local, self._url)
        if self._temporary:
            self._temporary.cleanup()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key -> value as text, for every leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)


def _kept(folder: str, kind: str) -> str | None:
    """The id that a tracker knows the run by, if an earlier attempt left one in the run's folder."""
    filesystem, root = fsspec.core.url_to_fs(folder)
    place = f"{root}/{kind}.json"
    return str(json.loads(filesystem.cat_file(place))["run_id"]) if filesystem.exists(place) else None


def _keep(folder: str, kind: str, identity: str) -> None:
    filesystem, root = fsspec.core.url_to_fs(folder)
    filesystem.makedirs(root, exist_ok=True)
    filesystem.pipe_file(f"{root}/{kind}.json", json.dumps({"run_id": identity}).encode())


def _send(folder: Path, url: str) -> None:
    """Copy the files under a local folder to a URL."""
    filesystem, root = fsspec.core.url_to_fs(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            target = f"{root}/{path.relative_to(folder).as_posix()}"
            filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            filesystem.put_file(str(path), target)
