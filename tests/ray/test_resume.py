"""A run that was stopped goes on as if nothing had been; what it leaves on disk on the way is whole.

No Ray here: a run of one worker is the loop in this process, more workers are processes over gloo. A run has 12
steps, 6 in each of its 2 epochs.
"""

import errno
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from banjoray.config.job import JobConfig
from banjoray.data.batches import epoch_batches
from banjoray.errors import TrainingFailed
from banjoray.tasks.text_classification import TextClassification
from banjoray.training import loop
from banjoray.training.checkpoints import Checkpoint, Position, Saver, Store
from banjoray.training.interface import Callbacks, FitResult, Moment
from banjoray.training.learned import Learned
from banjoray.training.loop import fit
from banjoray.training.preflight import prepare
from banjoray.training.strategies import build
from launched import Attempt, Case, Launch

JobMaker = Callable[..., JobConfig]
STEPS = 12
BOUND = 1e-5


class Interrupted(Exception):
    """Stands for a kill in the middle of a run."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def drops_out(folder: Path, lively_job: JobMaker) -> JobMaker:
    """Makes jobs that use the random generator at every step, and name their best checkpoint without ties."""

    def make(**changes: Any) -> JobConfig:
        best: dict[str, Any] = {"train__metric": "loss", "train__mode": "min"}
        return lively_job(folder, **best | {"model__dropout": 0.1, "train__checkpoint_every": 2} | changes)

    return make


def run(job: JobConfig, at: Path, **callbacks: Any) -> FitResult:
    ready = prepare(job)
    return fit(job, ready.rows, ready.task, ready.start, str(at), Callbacks(**callbacks))


def interrupt(job: JobConfig, at: Path, step: int) -> Path:
    """The folder of a run that died after ``step`` steps, before it could write anything more."""

    def watch(moment: Moment) -> None:
        if moment.step == step:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(job, at, watch=watch)
    return at


def go_on(job: JobConfig, at: Path) -> tuple[FitResult, list[Moment]]:
    seen: list[Moment] = []
    return run(job, at, watch=seen.append), seen


def checkpoints(at: Path) -> list[Checkpoint]:
    return Store(str(at), lambda line: None).all()


def names(at: Path) -> list[str]:
    return [checkpoint.name for checkpoint in checkpoints(at)]


def final(at: Path) -> dict[str, Tensor]:
    """Weights and moments of the newest checkpoint, which has to be that of the last step."""
    newest = at / "checkpoints" / f"step-{STEPS:08d}"
    return load_file(newest / "weights.safetensors") | load_file(newest / "optimizer.safetensors")


def different(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def farthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> tuple[float, str]:
    assert left.keys() == right.keys()
    return max((float((left[name] - right[name]).abs().max()), name) for name in left)


@pytest.fixture(scope="module")
def job(drops_out: JobMaker) -> JobConfig:
    return drops_out()


@pytest.fixture(scope="module")
def whole(folder: Path, job: JobConfig) -> Path:
    """A run that nothing stopped."""
    torch.set_num_threads(1)
    run(job, folder / "whole")
    return folder / "whole"


@pytest.fixture(scope="module")
def cut(folder: Path, job: JobConfig) -> Path:
    """A run that died after step 9: it has the scored checkpoint of step 6, and that of step 8."""
    torch.set_num_threads(1)
    interrupt(job, folder / "cut", 9)
    assert names(folder / "cut") == ["step-00000006", "step-00000008"]
    return folder / "cut"


@pytest.fixture
def copy(cut: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cut, tmp_path / "run"))


def test_run_stopped_inside_an_epoch_ends_bit_for_bit_as_one_that_was_not(
    job: JobConfig, whole: Path, copy: Path
) -> None:
    result, seen = go_on(job, copy)
    assert [moment.step for moment in seen] == [9, 10, 11, 12]
    assert different(final(copy), final(whole)) == []
    assert result.steps == STEPS
    assert checkpoints(copy) == checkpoints(whole)


def test_run_stopped_between_epochs_ends_bit_for_bit_as_one_that_was_not(
    drops_out: JobMaker, whole: Path, tmp_path: Path
) -> None:
    job = drops_out(train__checkpoint_every="epoch")
    _, seen = go_on(job, interrupt(job, tmp_path / "run", 7))
    assert [moment.step for moment in seen] == [7, 8, 9, 10, 11, 12]
    assert different(final(tmp_path / "run"), final(whole)) == []


def test_run_stopped_twice_ends_bit_for_bit_as_one_that_was_not(job: JobConfig, whole: Path, tmp_path: Path) -> None:
    for step in (3, 5, 11):
        interrupt(job, tmp_path / "run", step)
    go_on(job, tmp_path / "run")
    assert different(final(tmp_path / "run"), final(whole)) == []


def test_run_whose_dropout_torch_draws_itself_ends_bit_for_bit_as_one_that_was_not_stopped(
    drops_out: JobMaker, tmp_path: Path
) -> None:
    job = drops_out(train__gradient_checkpointing=True)
    run(job, tmp_path / "whole")
    go_on(job, interrupt(job, tmp_path / "run", 7))
    assert different(final(tmp_path / "run"), final(tmp_path / "whole")) == []


def test_dropout_is_on_from_the_first_step(drops_out: JobMaker, tmp_path: Path) -> None:
    losses: dict[float, float] = {}
    for dropout in (0.0, 0.1):
        with pytest.raises(Interrupted):
            run(drops_out(model__dropout=dropout), tmp_path / str(dropout), watch=_first_loss(losses, dropout))
    assert losses[0.0] != losses[0.1]


def _first_loss(losses: dict[float, float], key: float) -> Callable[[Moment], None]:
    def watch(moment: Moment) -> None:
        losses[key] = moment.loss
        raise Interrupted

    return watch


def test_another_seed_or_no_dropout_ends_elsewhere(drops_out: JobMaker, whole: Path, tmp_path: Path) -> None:
    others: dict[str, dict[str, Any]] = {"seed": {"train__seed": 1}, "dropout": {"model__dropout": 0.0}}
    for name, changes in others.items():
        run(drops_out(**changes), tmp_path / name)
        assert farthest(final(tmp_path / name), final(whole))[0] > BOUND


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "file",
    [
        "weights.safetensors",
        "optimizer.safetensors",
        "job.yaml",
        "checkpoint.json",
    ],
)
def test_truncated_newest_checkpoint_is_skipped_and_named_and_the_run_ends_the_same(
    job: JobConfig, whole: Path, copy: Path, file: str
) -> None:
    _truncate(copy / "checkpoints/step-00000008" / file)
    _, seen = go_on(job, copy)
    assert "checkpoint step-00000008 is torn" in seen[0].note
    assert file in seen[0].note
    assert "going on from step-00000006" in seen[0].note
    assert different(final(copy), final(whole)) == []


def test_newest_checkpoint_with_a_file_missing_is_skipped(job: JobConfig, whole: Path, copy: Path) -> None:
    (copy / "checkpoints/step-00000008/optimizer.safetensors").unlink()
    _, seen = go_on(job, copy)
    assert "step-00000008 is torn (optimizer.safetensors is missing)" in seen[0].note
    assert different(final(copy), final(whole)) == []


def test_run_with_no_whole_checkpoint_starts_from_the_base_model(job: JobConfig, whole: Path, copy: Path) -> None:
    for name in names(copy):
        _truncate(copy / "checkpoints" / name / "weights.safetensors")
    _, seen = go_on(job, copy)
    assert [moment.step for moment in seen] == list(range(1, STEPS + 1))
    assert different(final(copy), final(whole)) == []


def test_torn_checkpoint_does_not_push_out_the_progress_made_after_it(drops_out: JobMaker, tmp_path: Path) -> None:
    job = drops_out(train__checkpoint_every=1)
    at = interrupt(job, tmp_path / "run", 11)
    assert names(at) == ["step-00000006", "step-00000010"]
    _truncate(at / "checkpoints/step-00000010/weights.safetensors")
    interrupt(job, at, 9)
    _, seen = go_on(job, at)
    assert "going on from step-00000008" in seen[0].note


def test_half_written_checkpoint_of_a_killed_worker_is_cleared_away(job: JobConfig, copy: Path) -> None:
    left = copy / "checkpoints/.staging-killed"
    shutil.copytree(copy / "checkpoints/step-00000008", left)
    go_on(job, copy)
    assert not left.exists()


@pytest.mark.parametrize("keep", [2, 3])
def test_best_and_newest_checkpoints_are_all_there_is_on_disk_at_every_step(
    drops_out: JobMaker, tmp_path: Path, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Written at once instead of beside the next step, so that there is a moment to look at.
    monkeypatch.setattr(Saver, "begin", lambda _, work: work())
    job = drops_out(train__checkpoint_every=1, train__keep_checkpoints=keep)
    at = tmp_path / "run"
    listed: list[list[str]] = []

    def look(_: Moment) -> None:
        listed.append(sorted(path.name for path in (at / "checkpoints").glob("*")))

    result = run(job, at, watch=look)
    assert listed[4] == [f"step-{step:08d}" for step in range(5 - keep, 5)]
    # From step 6 on there is a scored checkpoint, which stays.
    assert listed[9] == ["step-00000006", *(f"step-{step:08d}" for step in range(11 - keep, 10))]
    assert [len(found) for found in listed] == [min(step, keep) for step in range(STEPS)]
    assert result.checkpoint.name in names(at)


def test_best_checkpoint_outlives_worse_ones_after_it(drops_out: JobMaker, tmp_path: Path) -> None:
    # So many epochs on so few rows that the model learns them by heart, and does worse on others.
    result = run(drops_out(train__epochs=10, train__learning_rate=3e-3, model__dropout=0.0), tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[-1]
    losses = [entry["loss"] for entry in newest.position.history]
    assert len(losses) == 10
    assert min(losses) < losses[-1] == newest.metrics["loss"]
    assert result.checkpoint.metrics["loss"] == min(losses)
    assert result.checkpoint.position.epoch == 1 + losses.index(min(losses))
    assert names(tmp_path / "run") == [result.checkpoint.name, newest.name]


def test_training_goes_on_while_a_checkpoint_is_written(
    job: JobConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    save, third = Store.save, threading.Event()

    def slow(store: Store, position: Position, *rest: Any) -> Checkpoint:
        if position.step == 2:
            assert third.wait(60), "step 3 waited for the checkpoint of step 2"
        return save(store, position, *rest)

    def watch(moment: Moment) -> None:
        seen.append(moment.step)
        if moment.step == 3:
            third.set()

    monkeypatch.setattr(Store, "save", slow)
    run(job, tmp_path / "run", watch=watch)
    assert different(final(tmp_path / "run"), final(whole)) == []


def test_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_ones_before(
    job: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Learned.save

    def full(learned: Learned, weights: Any, folder: Path) -> None:
        if len(names(tmp_path / "run")) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(learned, weights, folder)

    monkeypatch.setattr(Learned, "save", full)
    with pytest.raises(TrainingFailed, match=r"step-00000006 can't be written .* \(No space left on device\)"):
        run(job, tmp_path / "run")
    assert names(tmp_path / "run") == ["step-00000002", "step-00000004"]
    assert Store(str(tmp_path / "run"), pytest.fail).newest_whole() is not None


def test_run_told_to_end_writes_a_checkpoint_at_once_and_goes_on_bit_for_bit(
    job: JobConfig, whole: Path, tmp_path: Path
) -> None:
    at = tmp_path / "run"
    seen: list[Moment] = []
    result = run(job, at, watch=seen.append, should_stop=lambda: len(seen) == 2)
    # Asked after a step and before it is told: the third is the first that comes after two were seen.
    assert [moment.step for moment in seen] == [1, 2, 3]
    assert (result.stopped, result.steps, result.checkpoint.name) == (True, 3, "step-00000003")
    assert Store(str(at), pytest.fail).newest_whole() == result.checkpoint
    go_on(job, at)
    assert different(final(at), final(whole)) == []


def test_early_stopping_ends_after_its_patience_and_a_finished_run_stays_finished(
    drops_out: JobMaker, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"train__learning_rate": 3e-3, "model__dropout": 0.0}
    job = drops_out(train__epochs=10, train__early_stopping_patience=2, **changes)
    result = run(job, tmp_path / "run")
    losses = [entry["loss"] for entry in checkpoints(tmp_path / "run")[-1].position.history]
    assert 3 <= len(losses) < 10
    assert min(losses) == losses[-3]
    assert min(losses[-2:]) >= losses[-3]
    assert result.checkpoint.metrics["loss"] == min(losses)
    again, seen = go_on(job, tmp_path / "run")
    assert (seen, again.steps) == ([], 6 * len(losses))


def test_out_of_memory_halves_the_microbatches_from_the_newest_checkpoint_on(
    drops_out: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = drops_out(model__dropout=0.0)
    run(job, tmp_path / "whole")
    sizes: list[int] = []

    def too_small(job: JobConfig, model: Any, precision: Any) -> Any:
        def forward(module: Any, inputs: Any, whole: Any) -> None:
            del inputs
            if not module.training:
                return
            sizes.append(len(whole["input_ids"]))
            if sizes[-1] > 4 and len(sizes) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        model.register_forward_pre_hook(forward, with_kwargs=True)
        return build(job, model, precision)

    monkeypatch.setattr(loop, "build", too_small)
    seen: list[Moment] = []
    run(job, tmp_path / "run", watch=seen.append)
    # Three steps of 16 rows, and the fourth does not fit, nor does it in halves.
    assert [moment.step for moment in seen[:3]] == [1, 2, 3]
    assert "4 microbatches per step" in seen[-1].note
    assert "going on from step-00000002" in seen[-1].note
    assert sizes[-1] <= 4
    difference, weight = farthest(final(tmp_path / "run"), final(tmp_path / "whole"))
    assert difference <= BOUND, weight


def test_steps_without_numbers_are_skipped_up_to_their_limit(
    drops_out: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_step(monkeypatch, 3)
    seen: list[Moment] = []
    job = drops_out(train__max_skipped_steps=1)
    at = tmp_path / "run"
    run(job, at, watch=seen.append)
    assert [np.isfinite(moment.loss) for moment in seen] == [step != 3 for step in range(1, STEPS + 1)]
    assert checkpoints(at)[-1].position.broken == 1
    assert all(torch.isfinite(tensor).all() for tensor in final(at).values())
    poison_step(monkeypatch, 3)
    with pytest.raises(TrainingFailed, match=r"loss is nan .* at step 3 .*train rows \d+"):
        run(drops_out(), tmp_path / "strict")


def poison_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the loss of that step, counted over a run without interruption, no number."""
    count = [0]
    losses = TextClassification.losses

    def poisoned(task: TextClassification, *arguments: Any) -> Tensor:
        count[0] += 1
        return losses(task, *arguments) * (float("nan") if count[0] == step else 1.0)

    monkeypatch.setattr(TextClassification, "losses", poisoned)


def test_finished_run_started_again_trains_nothing_and_gives_the_same_result(job: JobConfig, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    result, seen = go_on(job, whole)
    assert seen == []
    assert result.steps == STEPS
    assert result.checkpoint in checkpoints(whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_loss_that_is_not_a_number_names_the_step_and_its_rows(drops_out: JobMaker, tmp_path: Path) -> None:
    job = drops_out(train__learning_rate=1e30)
    told = r"loss is (nan|inf|\d.*) and the gradients' norm (nan|inf) at step \d+ \(learning rate .*e\+\d+"
    with pytest.raises(TrainingFailed, match=told) as caught:
        run(job, tmp_path / "run")
    step = int(str(caught.value).partition("at step ")[2].split()[0])
    lengths = prepare(job).rows.train.lengths
    batch = epoch_batches(lengths, job.train.batch_size, job.train.seed, 0)[step - 1]
    assert f"train rows {', '.join(str(row + 1) for row in batch[:8])}, ...)" in str(caught.value)


def test_an_epoch_is_reported_when_its_checkpoint_is_written(job: JobConfig, tmp_path: Path) -> None:
    # A scheduler ends a trial with its report: what it reported has to be there.
    there: list[str] = []
    run(job, tmp_path / "run", report=lambda _: there.append(names(tmp_path / "run")[-1]))
    assert there == ["step-00000006", "step-00000012"]


def test_every_finished_epoch_is_reported_with_its_metrics(job: JobConfig, tmp_path: Path) -> None:
    reported: list[dict[str, float]] = []
    run(job, tmp_path / "run", report=reported.append)
    assert [entry["epoch"] for entry in reported] == [1, 2]
    assert set(reported[0]) == {*TextClassification.metrics, "epoch", "train_loss"}
    saved = json.loads((tmp_path / "run/checkpoints/step-00000012/checkpoint.json").read_text())
    assert saved["position"]["history"] == reported


WORLDS = (
    *(f"{strategy}-plain" for strategy in ("ddp", "fsdp", "zero1", "zero2", "zero3")),
    *(f"{strategy}-{variant}" for strategy in ("ddp", "fsdp", "zero2") for variant in ("frozen", "lora")),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "frozen": {"freeze": {"layers": 2}},
    "lora": {"adapter": {"type": "lora", "dropout": 0.0}},
}
# Two workers, one of which dies; then one alone, which dies too; then two.
CHANGING = (
    {"workers": 2, "does": "kill", "rank": 1, "at_step": 6},
    {"workers": 1, "does": "kill", "rank": 0, "at_step": 10},
    {"workers": 2},
)


@dataclass(frozen=True)
class Worlds:
    """Runs on a changing number of workers, and what they tell; one worker's undisturbed ones, by variant."""

    attempts: dict[str, list[Attempt]]
    runs: Path
    whole: dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def worlds(folder: Path, drops_out: JobMaker, launch: Launch) -> Worlds:
    def job(variant: str, **changes: Any) -> JobConfig:
        return drops_out(**VARIANTS[variant] | {"model__dropout": 0.0} | changes)

    runs = folder / "worlds"
    torch.set_num_threads(1)
    for variant in VARIANTS:
        run(job(variant), runs / variant)
    cases: list[Case] = []
    for name in WORLDS:
        strategy, _, variant = name.partition("-")
        changing = job(variant, scale__workers=2, scale__strategy=strategy)
        cases.append({"name": name, "job": changing, "run": runs / name, "attempts": CHANGING})
    return Worlds(launch(folder / "workers", cases), runs, {variant: final(runs / variant) for variant in VARIANTS})


@pytest.mark.parametrize("name", WORLDS)
def test_run_that_loses_a_worker_and_gets_one_back_ends_as_one_that_never_had_two(worlds: Worlds, name: str) -> None:
    two, one, again = worlds.attempts[name]
    assert two.steps == [1, 2, 3, 4, 5]
    assert f"going on from step-{one.steps[0] - 1:08d}" in one.note
    assert one.steps in ([3, *range(4, 10)], [5, *range(6, 10)])
    assert f"going on from step-{again.steps[0] - 1:08d}" in again.note
    assert (again.steps[0] in (7, 9), again.steps[-1]) == (True, STEPS)
    difference, weight = farthest(final(worlds.runs / name), worlds.whole[name.partition("-")[2]])
    assert difference <= BOUND, weight
