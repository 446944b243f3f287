"""The trackers themselves: a file for tensorboard, an MLflow run, a Weights & Biases run; each used by one thread."""

import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import fsspec

from banjoray.config.job import JobConfig, is_url

# MLflow's limits: a parameter's characters, and parameters of one request.
VALUE_LIMIT, PARAMS_LIMIT = 6000, 100
MLFLOW_STEPS = 50


@dataclass(frozen=True)
class Told:
    """Values of a step or an epoch; ``at`` is in seconds since 1970."""

    kind: str
    step: int
    values: Mapping[str, float]
    at: float

    def named(self) -> dict[str, float]:
        """Values by their whole names, as train/loss."""
        return {f"{self.kind}/{name}": float(value) for name, value in self.values.items()}


class Tracker(Protocol):
    """Who is told; all calls come from one thread. ``every_s``: how often ``flush`` is called between epochs."""

    every_s: float | None = None
    notes: tuple[str, ...] = ()

    def tell(self, told: Told) -> None:
        """Take values; they may be sent later."""
        ...

    def flush(self) -> None:
        """Send what was told so far."""
        ...

    def close(self, failed: bool) -> None:
        """Send everything and end."""
        ...


class TensorBoard(Tracker):
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

    def tell(self, told: Told) -> None:
        """See `Tracker`."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in told.named().items()]
        self._writer.write_event(Event(wall_time=told.at, step=told.step, summary=Summary(value=values)))

    def flush(self) -> None:
        """See `Tracker`."""
        self._writer.flush()
        if self._url:
            _send(self._local, self._url)

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self.flush()
        self._writer.close()
        if self._temporary:
            self._temporary.cleanup()


class MLflow(Tracker):
    """An MLflow run, found again by ``<folder>/mlflow.json``; address and credentials are in MLflow's own variables."""

    every_s = 10.0

    def __init__(self, folder: str, run: str, job: JobConfig) -> None:
        import mlflow

        self._client: Any = mlflow.MlflowClient()
        self._waiting: list[Told] = []
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

    def tell(self, told: Told) -> None:
        """See `Tracker`."""
        if told.step > self._done[told.kind]:
            self._waiting.append(told)
        if len(self._waiting) >= MLFLOW_STEPS:
            self.flush()

    def flush(self) -> None:
        """See `Tracker`."""
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
        """See `Tracker`."""
        self.flush()
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class WandB(Tracker):
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

    def tell(self, told: Told) -> None:
        """See `Tracker`."""
        if told.step >= self._first:
            self._run.log(told.named(), step=told.step)

    def flush(self) -> None:
        """Nothing to do: wandb sends by itself."""

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
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
