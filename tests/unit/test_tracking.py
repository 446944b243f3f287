"""Who is told of a run: what is written reads back, a resumed run tells nothing twice, and no tracker ends a run."""

import importlib.util
import math
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.errors import ConfigError
from banjoray.training import trackers, tracking
from banjoray.training.interface import Callbacks, Moment
from banjoray.training.tracking import Trackers, check_trackers, open_trackers, tracked

TREE = {"name": "tiny", "task": "text-classification", "data": {"source": "banjoray:emotion"}}
JOB = validate(JobConfig, TREE | {"train": {"class_weights": {"joy!": 2.0}}}, "job")


def nobody(line: str) -> None:
    raise AssertionError(f"a tracker said: {line}")


def told_run(kind: str, folder: str, steps: range, from_step: int = 0, failed: bool = False) -> None:
    """A run of some steps, the loss of step n is 1 / n, with an epoch at the last."""
    trackers = open_trackers([kind], folder, "tiny-1", JOB, from_step, nobody)
    for step in steps:
        trackers.step(step, {"loss": 1 / step, "learning_rate": 1e-3})
    trackers.epoch(steps[-1], {"f1_macro": 0.5, "loss": 2.0})
    trackers.close(failed)


def events(content: bytes) -> Iterator[Any]:
    """The events of a file: length, its checksum, event, its checksum; one after the other."""
    from tensorboardX.proto.event_pb2 import Event

    start = 0
    while start < len(content):
        (length,) = struct.unpack("Q", content[start : start + 8])
        yield Event.FromString(content[start + 12 : start + 12 + length])
        start += 12 + length + 4


def scalars(content: bytes) -> dict[str, dict[int, float]]:
    """Tag -> step -> value."""
    found: dict[str, dict[int, float]] = {}
    for event in events(content):
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def eventually(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


class Fake:
    """A tracker that keeps what it hears."""

    every_s: float | None = None
    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.heard: list[str] = []

    def tell(self, told: Any) -> None:
        self.heard.append(f"{told.kind} {told.step} {told.values}")

    def flush(self) -> None:
        self.heard.append("flush")

    def close(self, failed: bool) -> None:
        self.heard.append(f"close {failed}")


def test_tensorboard_files_hold_every_step_and_epoch(tmp_path: Path) -> None:
    told_run("tensorboard", str(tmp_path), range(1, 61))
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    found = scalars(file.read_bytes())
    assert found["train/loss"] == pytest.approx({step: 1 / step for step in range(1, 61)})
    assert list(found["train/learning_rate"]) == list(range(1, 61))
    assert found["epoch/f1_macro"] == {60: 0.5}
    assert found["epoch/loss"] == {60: 2.0}


def test_a_resumed_run_begins_with_the_event_that_drops_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import SessionLog

    told_run("tensorboard", f"file://{tmp_path}", range(1, 31))
    told_run("tensorboard", str(tmp_path), range(21, 41), from_step=20)
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    started = [event for event in events(second.read_bytes()) if event.HasField("session_log")]
    assert [(event.session_log.status, event.step) for event in started] == [(SessionLog.START, 21)]
    assert list(scalars(first.read_bytes())["train/loss"]) == list(range(1, 31))
    assert list(scalars(second.read_bytes())["train/loss"]) == list(range(21, 41))


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    told_run("tensorboard", str(tmp_path), range(1, 31))
    told_run("tensorboard", str(tmp_path), range(21, 41), from_step=20)
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in read.Scalars("train/loss")] == list(range(1, 41))
    # The epoch that ended at step 30 is told again if the run gets there again.
    assert [event.step for event in read.Scalars("epoch/f1_macro")] == [40]


def test_tensorboard_files_of_a_run_behind_a_url_are_there_after_an_epoch_and_whole_at_the_end() -> None:
    filesystem, root = fsspec.core.url_to_fs("memory://tracking/tiny-1")

    def files() -> list[bytes]:
        return [filesystem.cat_file(path) for path in filesystem.glob(f"{root}/tensorboard/*")]

    trackers = open_trackers(["tensorboard"], "memory://tracking/tiny-1", "tiny-1", JOB, 0, nobody)
    trackers.step(1, {"loss": 3.0})
    trackers.epoch(1, {"f1_macro": 0.25})
    eventually(lambda: bool(files()) and bool(files()[0]))
    assert scalars(files()[0]) == {"train/loss": {1: 3.0}, "epoch/f1_macro": {1: 0.25}}
    trackers.step(2, {"loss": 4.0})
    trackers.close()
    (whole,) = files()
    assert scalars(whole)["train/loss"] == {1: 3.0, 2: 4.0}


def test_what_was_told_is_kept_as_it_was_then() -> None:
    fake = Fake()
    trackers = Trackers({"fake": lambda: fake}, nobody)
    values = {"loss": 1.0}
    trackers.step(1, values)
    values["loss"] = 2.0
    trackers.epoch(1, values)
    trackers.close(failed=True)
    assert fake.heard == ["train 1 {'loss': 1.0}", "epoch 1 {'loss': 2.0}", "flush", "close True"]


def test_a_closed_tracker_is_told_nothing_more() -> None:
    fake = Fake()
    trackers = Trackers({"fake": lambda: fake}, nobody)
    trackers.close()
    trackers.close()
    trackers.step(1, {"loss": 1.0})
    assert fake.heard == ["close False"]


def test_what_was_told_is_flushed_between_epochs_too() -> None:
    fake = Fake()
    fake.every_s = 0.01
    trackers = Trackers({"fake": lambda: fake}, nobody)
    trackers.step(1, {})
    eventually(lambda: "flush" in fake.heard)
    trackers.step(2, {})
    trackers.close()
    assert [line for line in fake.heard if line != "flush"] == ["train 1 {}", "train 2 {}", "close False"]


def test_telling_a_tracker_that_hangs_does_not_wait_for_it() -> None:
    fake, gate = Fake(), threading.Event()

    def slow() -> Fake:
        gate.wait()
        return fake

    trackers = Trackers({"slow": slow}, nobody)
    for step in range(5000):
        trackers.step(step, {"loss": 1.0})
    assert fake.heard == []
    gate.set()
    trackers.close()
    assert len(fake.heard) == 5001


@pytest.mark.parametrize("when", ["opened", "told"])
def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(when: str) -> None:
    class Broken(Fake):
        def tell(self, told: Any) -> None:
            raise ConnectionError("server is away\nand more")

    def absent() -> Fake:
        raise ConnectionError("server is away\nand more")

    fake = Fake()
    lines: list[str] = []
    said_in: set[str] = set()

    def say(line: str) -> None:
        lines.append(line)
        said_in.add(threading.current_thread().name)

    trackers = Trackers({"broken": absent if when == "opened" else Broken, "fake": lambda: fake}, say)
    for step in range(1, 101):
        trackers.step(step, {"loss": 1.0})
    trackers.close()
    assert lines == ["tracking: broken failed (ConnectionError: server is away); the run goes on without it"]
    assert said_in == {threading.current_thread().name}
    assert len(fake.heard) == 101


def test_the_end_of_a_run_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.05)
    gate = threading.Event()

    class Stuck(Fake):
        def close(self, failed: bool) -> None:
            gate.wait()

    lines: list[str] = []
    trackers = Trackers({"stuck": Stuck}, lines.append)
    trackers.close()
    gate.set()
    assert lines == ["tracking: stuck did not take everything in 0 s; the rest is lost"]


def moment(step: int) -> Moment:
    return Moment(step, 9, 1, 3, loss=1 / step, learning_rate=1e-3, rows_per_s=80.0, padding=0.1, gradient_norm=2.0)


def test_a_job_without_trackers_tells_nobody_else(tmp_path: Path) -> None:
    seen: list[Moment] = []
    with tracked(JOB.with_values({"tracking": []}), str(tmp_path), Callbacks(watch=seen.append)) as callbacks:
        callbacks.watch(moment(1))
        callbacks.scored(1, {"f1_macro": 0.5})
    assert seen == [moment(1)]
    assert list(tmp_path.iterdir()) == []


def test_the_trackers_of_a_job_hear_what_its_callbacks_hear(tmp_path: Path) -> None:
    seen: list[Moment] = []
    scores: list[tuple[int, dict[str, float]]] = []
    told = Callbacks(watch=seen.append, scored=lambda step, metrics: scores.append((step, metrics)))
    with tracked(JOB, str(tmp_path), told) as callbacks:
        for step in (4, 5, 6):
            callbacks.watch(moment(step))
        callbacks.scored(6, {"f1_macro": 0.5})
    assert seen == [moment(4), moment(5), moment(6)]
    assert scores == [(6, {"f1_macro": 0.5})]
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = scalars(file.read_bytes())
    assert found["train/gradient_norm"] == {4: 2.0, 5: 2.0, 6: 2.0}
    assert found["epoch/f1_macro"] == {6: 0.5}
    # What an earlier attempt told of these steps is dropped.
    assert [event.step for event in events(file.read_bytes()) if event.HasField("session_log")] == [4]


@pytest.mark.parametrize(
    ("kind", "module"), [("tensorboard", "tensorboardX"), ("mlflow", "mlflow"), ("wandb", "wandb")]
)
def test_a_tracker_that_is_not_installed_is_refused(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(importlib.util, "find_spec", asked.append)
    with pytest.raises(ConfigError) as caught:
        check_trackers([kind])
    assert str(caught.value) == (
        f"tracking: '{kind}' is not installed; pip install {module}, or take it out of tracking"
    )
    assert asked == [module]


def test_a_folder_that_wandb_left_behind_is_not_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "left_by_wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(tracking.MODULES, "wandb", "left_by_wandb")
    with pytest.raises(ConfigError, match="'wandb' is not installed"):
        check_trackers(["wandb"])


def test_mlflow_without_the_address_of_a_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.MODULES, "mlflow", "json")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="tracking: 'mlflow' needs the environment variable MLFLOW_TRACKING_URI"):
        check_trackers(["mlflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    check_trackers(["mlflow", "tensorboard"])


def test_no_trackers_are_fine() -> None:
    check_trackers([])
    trackers = open_trackers([], "nowhere", "tiny-1", JOB, 0, nobody)
    trackers.step(1, {"loss": math.nan})
    trackers.close()


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow's client on a file store, which needs no database."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return mlflow.MlflowClient(f"file://{tmp_path}/mlflow")


def mlflow_runs(client: Any) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name("tiny").experiment_id]))


def test_mlflow_gets_the_job_and_every_step(mlflow_store: Any, tmp_path: Path) -> None:
    check_trackers(["mlflow"])
    told_run("mlflow", str(tmp_path / "run"), range(1, 121))
    (run,) = mlflow_runs(mlflow_store)
    assert (run.info.run_name, run.info.status) == ("tiny-1", "FINISHED")
    assert run.data.params["train.learning_rate"] == "2e-05"
    assert run.data.params["train.class_weights.joy_"] == "2.0"
    assert len(run.data.params) > 60
    history = mlflow_store.get_metric_history(run.info.run_id, "train/loss")
    assert {one.step: one.value for one in history} == pytest.approx({step: 1 / step for step in range(1, 121)})
    assert [one.step for one in mlflow_store.get_metric_history(run.info.run_id, "epoch/f1_macro")] == [120]


def test_mlflow_goes_on_with_the_run_and_is_told_no_step_twice(mlflow_store: Any) -> None:
    told_run("mlflow", "memory://mlflow/tiny-1", range(1, 31), failed=True)
    (run,) = mlflow_runs(mlflow_store)
    assert run.info.status == "FAILED"
    told_run("mlflow", "memory://mlflow/tiny-1", range(21, 41), from_step=20)
    (run,) = mlflow_runs(mlflow_store)
    assert run.info.status == "FINISHED"
    steps = [one.step for one in mlflow_store.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == list(range(1, 41))
    assert [one.step for one in mlflow_store.get_metric_history(run.info.run_id, "epoch/loss")] == [30, 40]


def test_mlflow_gets_long_values_cut_rather_than_refused(
    mlflow_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "VALUE_LIMIT", 3)
    told_run("mlflow", str(tmp_path / "run"), range(1, 2))
    (run,) = mlflow_runs(mlflow_store)
    assert run.data.params["train.schedule"] == "lin"


@pytest.mark.usefixtures("mlflow_store")
def test_an_mlflow_store_that_is_away_costs_a_line_and_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/file/mlflow")
    lines: list[str] = []
    trackers = open_trackers(["mlflow", "tensorboard"], str(tmp_path / "run"), "tiny-1", JOB, 0, lines.append)
    for step in range(1, 4):
        trackers.step(step, {"loss": 1.0})
    trackers.close()
    assert len(lines) == 1
    assert lines[0].startswith("tracking: mlflow failed (")
    (file,) = (tmp_path / "run/tensorboard").iterdir()
    assert list(scalars(file.read_bytes())["train/loss"]) == [1, 2, 3]


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_writes_a_run_of_the_same_name_without_a_server(tmp_path: Path) -> None:
    check_trackers(["wandb"])
    told_run("wandb", str(tmp_path), range(1, 11))
    (log,) = (tmp_path / "wandb").glob("offline-run-*-tiny-1-*/run-tiny-1-*.wandb")
    content = log.read_bytes()
    for part in (b"train/loss", b"epoch/f1_macro", b"max_skipped_steps"):
        assert part in content


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_files_of_a_run_behind_a_url_are_kept_beside_it() -> None:
    told_run("wandb", "memory://wandb/tiny-1", range(1, 3), failed=True)
    filesystem, root = fsspec.core.url_to_fs("memory://wandb/tiny-1")
    (log,) = filesystem.glob(f"{root}/wandb/offline-run-*-tiny-1-*/run-tiny-1-*.wandb")
    assert b"train/loss" in filesystem.cat_file(log)


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_knows_a_resumed_run_again_and_no_other_run_of_the_same_name(tmp_path: Path) -> None:
    def ids(folder: str) -> set[str]:
        return {log.stem.removeprefix("run-") for log in (tmp_path / folder / "wandb").glob("offline-run-*/*.wandb")}

    for folder in ("mine", "mine", "yours"):
        told_run("wandb", str(tmp_path / folder), range(1, 3))
    assert (len(ids("mine")), len(ids("yours"))) == (1, 1)
    assert ids("mine") != ids("yours")
