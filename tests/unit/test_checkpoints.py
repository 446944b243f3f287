"""Checkpoints of a run: complete or absent, whole or skipped by name, the best and the newest kept; here and remote."""

import json
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from banjoray.errors import TrainingFailed
from banjoray.training.checkpoints import MANIFEST, Checkpoint, Position, Saver, Store

FILES = ("model/config.json", "model/model.safetensors", "optimizer.safetensors")


class Shelf:
    """A store, what it warned of, and a way to its files."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.warnings: list[str] = []
        self.store = self.again()
        self.filesystem, root = fsspec.core.url_to_fs(run)
        self.root = f"{root}/checkpoints"

    def again(self) -> Store:
        """The store as a process that starts now sees it."""
        return Store(self.run, self.warnings.append)

    def save(self, step: int, **metrics: float) -> Checkpoint:
        return self.store.save(Position(step, step // 10, 0, 0.5, ({"f1": 0.25},)), metrics, "f", writer(step))

    def names(self) -> list[str]:
        """What lies in the folder, complete or not."""
        found = self.filesystem.ls(self.root, detail=False) if self.filesystem.exists(self.root) else []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def kept(self) -> list[int]:
        return [checkpoint.position.step for checkpoint in self.again().all()]

    def cut(self, step: int, name: str, share: float) -> None:
        path = f"{self.root}/step-{step:08d}/{name}"
        content = self.filesystem.cat_file(path)
        self.filesystem.pipe_file(path, content[: int(len(content) * share)])

    def remove(self, step: int, name: str) -> None:
        self.filesystem.rm(f"{self.root}/step-{step:08d}/{name}")


def writer(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text(json.dumps({"step": step}))
        save_file({"weight": torch.full((3, 3), float(step))}, folder / "model/model.safetensors")
        save_file({"exp_avg.weight": torch.full((3, 3), -float(step))}, folder / "optimizer.safetensors")

    return write


@pytest.fixture(params=["local", "memory"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    return Shelf(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run")


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go in this test, so that it sees what stays behind."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_new_run_has_no_checkpoint(shelf: Shelf) -> None:
    assert shelf.store.all() == []
    assert shelf.store.newest_whole() is None
    assert shelf.store.best("f1", "max") is None


def test_a_checkpoint_comes_back_as_it_was_saved(shelf: Shelf) -> None:
    saved = shelf.save(10, f1=0.5)
    (found,) = shelf.again().all()
    assert found == saved
    assert found.position == Position(10, 1, 0, 0.5, ({"f1": 0.25},))
    assert (found.name, found.metrics, tuple(found.files)) == ("step-00000010", {"f1": 0.5}, FILES)
    assert shelf.again().newest_whole() == saved
    assert shelf.warnings == []


def test_a_checkpoint_is_a_local_folder_to_whoever_loads_it(shelf: Shelf) -> None:
    folder = shelf.again().local(shelf.save(10))
    assert load_file(folder / "model/model.safetensors")["weight"][0, 0] == 10
    assert load_file(folder / "optimizer.safetensors")["exp_avg.weight"][0, 0] == -10
    assert json.loads((folder / MANIFEST).read_text())["name"] == "step-00000010"


def test_checkpoints_are_in_the_order_of_steps(shelf: Shelf) -> None:
    for step in (9, 100, 20):
        shelf.save(step)
    assert shelf.kept() == [9, 20, 100]
    newest = shelf.again().newest_whole()
    assert newest is not None
    assert newest.position.step == 100


def test_the_same_step_saved_again_replaces_the_first(shelf: Shelf) -> None:
    shelf.save(10, f1=0.1)
    again = shelf.save(10, f1=0.2)
    assert shelf.again().all() == [again]
    assert shelf.again().newest_whole() == again


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_torn_newest_checkpoint_is_named_and_the_one_before_is_used(shelf: Shelf, name: str, share: float) -> None:
    shelf.save(10, f1=0.5)
    before = shelf.save(20, f1=0.6)
    shelf.save(30, f1=0.7)
    shelf.cut(30, name, share)
    assert shelf.again().newest_whole() == before
    assert len(shelf.warnings) == 1
    line = shelf.warnings[0]
    assert line.startswith(f"checkpoint step-00000030 is torn ({name}")
    assert line.endswith("; using the one before")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_makes_a_checkpoint_torn(shelf: Shelf, name: str) -> None:
    before = shelf.save(10)
    shelf.save(20)
    shelf.remove(20, name)
    assert shelf.again().newest_whole() == before
    assert shelf.warnings == [f"checkpoint step-00000020 is torn ({name} is missing); using the one before"]


def test_a_folder_without_its_manifest_is_no_checkpoint(shelf: Shelf) -> None:
    before = shelf.save(10, f1=0.1)
    shelf.save(20, f1=0.9)
    shelf.remove(20, MANIFEST)
    store = shelf.again()
    assert (store.all(), store.newest_whole(), store.best("f1", "max")) == ([before], before, before)


def test_several_torn_checkpoints_are_all_passed_over(shelf: Shelf) -> None:
    first = shelf.save(10)
    for step in (20, 30):
        shelf.save(step)
        shelf.cut(step, FILES[1], 0.5)
    assert shelf.again().newest_whole() == first
    assert [line.split()[1] for line in shelf.warnings] == ["step-00000030", "step-00000020"]


def test_where_every_checkpoint_is_torn_there_is_none(shelf: Shelf) -> None:
    shelf.save(10)
    shelf.cut(10, FILES[2], 0.5)
    assert shelf.again().newest_whole() is None


def test_a_torn_checkpoint_does_not_push_out_those_made_after_it(shelf: Shelf) -> None:
    shelf.save(10, f1=0.5)
    shelf.save(40, f1=0.4)
    shelf.cut(40, FILES[0], 0.5)
    store = shelf.again()
    assert store.newest_whole() is not None
    store.save(Position(20), {"f1": 0.3}, "f", writer(20))
    store.prune("f1", "max", 2)
    assert shelf.kept() == [10, 20]


@pytest.mark.parametrize(("mode", "step"), [("max", 20), ("min", 30)])
def test_best_goes_by_the_mode_and_the_earlier_of_two_equals(shelf: Shelf, mode: str, step: int) -> None:
    for number, value in ((10, 0.5), (20, 0.9), (30, 0.1), (40, 0.9), (50, 0.1)):
        shelf.save(number, score=value, other=-value)
    shelf.save(60)
    best = shelf.again().best("score", mode)
    assert best is not None
    assert best.position.step == step


@pytest.mark.parametrize(
    ("keep", "left"), [(2, [20, 60]), (3, [20, 50, 60]), (4, [20, 40, 50, 60]), (9, [10, 20, 30, 40, 50, 60])]
)
def test_prune_keeps_the_best_and_the_newest(shelf: Shelf, keep: int, left: list[int]) -> None:
    for number, value in ((10, 0.5), (20, 0.9), (30, 0.1), (40, 0.2), (50, 0.3)):
        shelf.save(number, f1=value)
    shelf.save(60)
    shelf.again().prune("f1", "max", keep)
    assert shelf.kept() == left
    assert shelf.names() == [f"step-{step:08d}" for step in left]


def test_prune_keeps_as_many_where_the_newest_is_the_best(shelf: Shelf) -> None:
    for number, value in ((10, 0.1), (20, 0.2), (30, 0.3)):
        shelf.save(number, f1=value)
    shelf.again().prune("f1", "max", 2)
    assert shelf.kept() == [20, 30]


def test_prune_keeps_the_newest_where_none_has_a_score(shelf: Shelf) -> None:
    for number in (10, 20, 30):
        shelf.save(number)
    shelf.again().prune("f1", "max", 2)
    assert shelf.kept() == [20, 30]


def test_prune_removes_what_crashed_writers_left(shelf: Shelf) -> None:
    shelf.save(10, f1=0.5)
    shelf.filesystem.makedirs(f"{shelf.root}/.staging-abc/model", exist_ok=True)
    shelf.filesystem.pipe_file(f"{shelf.root}/.staging-abc/model/config.json", b"{}")
    shelf.filesystem.makedirs(f"{shelf.root}/step-00000020", exist_ok=True)
    shelf.filesystem.pipe_file(f"{shelf.root}/step-00000020/optimizer.safetensors", b"half")
    shelf.again().prune("f1", "max", 2)
    assert shelf.names() == ["step-00000010"]


def full_disk(_: Path) -> None:
    raise OSError(28, "No space left on device")


def unwritable_tensors(folder: Path) -> None:
    # safetensors does not raise an OSError when the system refuses a write.
    save_file({"weight": torch.zeros(1)}, folder / "no such folder" / "model.safetensors")


@pytest.mark.parametrize("fail", [full_disk, unwritable_tensors])
def test_a_write_that_fails_half_way_leaves_the_earlier_ones_whole_and_nothing_else(
    shelf: Shelf, scratch: Path, fail: Callable[[Path], None]
) -> None:
    before = shelf.save(10, f1=0.5)

    def write(folder: Path) -> None:
        writer(20)(folder)
        fail(folder)

    with pytest.raises(TrainingFailed) as caught:
        shelf.store.save(Position(20), {"f1": 0.9}, "f", write)
    message = str(caught.value)
    assert message.startswith(f"checkpoint step-00000020 can't be written to {shelf.store.root} (")
    assert message.endswith("the checkpoints before it are whole. Free space, then run the same command to go on.")
    assert ("No space left on device" in message) == (fail is full_disk)
    assert shelf.again().all() == [before]
    assert shelf.again().newest_whole() == before
    assert shelf.names() == ["step-00000010"]
    assert list(scratch.iterdir()) == []


def test_an_upload_that_fails_half_way_leaves_no_checkpoint(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(f"memory://{tmp_path.name}/run")
    before = shelf.save(10)
    put = shelf.filesystem.put_file

    def broken(source: str, target: str) -> None:
        if target.endswith("optimizer.safetensors"):
            raise OSError("connection reset")
        put(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(shelf.filesystem), "put_file", lambda _, source, target: broken(source, target))
        with pytest.raises(TrainingFailed, match=r"\(connection reset\)"):
            shelf.save(20)
    assert shelf.again().all() == [before]
    assert list(scratch.iterdir()) == []
    assert shelf.save(20) == shelf.again().newest_whole()


def test_the_manifest_is_uploaded_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(f"memory://{tmp_path.name}/run")
    put, order = shelf.filesystem.put_file, []

    def noted(_: object, source: str, target: str) -> None:
        order.append(target.partition("step-00000010/")[2])
        put(source, target)

    monkeypatch.setattr(type(shelf.filesystem), "put_file", noted)
    shelf.save(10)
    assert order == [*FILES, MANIFEST]


def test_a_run_can_be_moved_with_its_checkpoints(tmp_path: Path) -> None:
    saved = Shelf(str(tmp_path / "here")).save(10)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert Shelf(str(tmp_path / "there")).store.newest_whole() == saved


def test_room_is_made_by_the_oldest_and_never_by_the_best_or_the_newest(shelf: Shelf) -> None:
    for step, value in ((10, 0.2), (20, 0.9), (30, 0.1), (40, 0.3), (50, 0.2)):
        shelf.save(step, f1=value)
    one = sum(shelf.filesystem.size(f"{shelf.root}/step-00000010/{name}") for name in FILES)
    # Files differ by the digits of their step.
    shelf.store.make_room("f1", "max", one, 6 * one + 60)
    assert shelf.kept() == [10, 20, 30, 40, 50]
    shelf.store.make_room("f1", "max", one, 4 * one + 40)
    assert shelf.kept() == [20, 40, 50]
    shelf.store.make_room("f1", "max", one, 1)
    assert shelf.kept() == [20, 50]


def test_noted_microbatches_outlive_the_process_and_the_clearing_of_old_checkpoints(shelf: Shelf) -> None:
    assert shelf.store.microbatches(2) == 2
    shelf.store.note_microbatches(4)
    for step in (10, 20, 30):
        shelf.save(step, f1=0.5)
    shelf.store.prune("f1", "max", 2)
    assert shelf.again().microbatches(2) == 4
    assert shelf.again().microbatches(8) == 8


def test_what_is_saved_beside_training_is_whole_before_the_next_begins_and_its_errors_come_out() -> None:
    done: list[str] = []
    go_on = threading.Event()

    def slow() -> None:
        assert go_on.wait(60)
        done.append("first")

    def broken() -> None:
        raise TrainingFailed("full")

    with Saver() as saver:
        saver.begin(slow)
        assert done == []
        go_on.set()
        saver.begin(broken)
        assert done == ["first"]
        with pytest.raises(TrainingFailed, match="full"):
            saver.settle()
        saver.begin(lambda: done.append("last"))
    assert done == ["first", "last"]
