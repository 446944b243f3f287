"""A run outlives its workers: killed, hung or told to end, it ends bit for bit as one that nothing befell.

First without Ray: two workers over gloo, and a parent that starts them again as Ray Train does. A run has 12 steps, 6
in each of its 2 epochs, and dropout. Then with Ray, as users have it.
"""

import hashlib
import json
import random
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import banjoray
from banjoray.config.job import JobConfig
from banjoray.errors import Stopped, TrainingFailed
from banjoray.registry import Registry
from banjoray.training.checkpoints import Store
from banjoray.training.interface import Moment
from commands import DRIVER, Command, name_of
from launched import Attempt, Case, Launch

# A machine that is busy otherwise takes its time.
pytestmark = pytest.mark.timeout(1200)

STEPS = 12
STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "frozen": {"freeze": {"layers": 2}},
    "lora": {"adapter": {"type": "lora", "dropout": 0.1}},
}
CASES = tuple(f"{strategy}-{variant}" for strategy in STRATEGIES for variant in VARIANTS)

TOLD = ("ddp", "zero2")

# Rank 1 dies in the first epoch, then in the second, when the newest checkpoint is torn too.
KILLED = (
    {"workers": 2, "does": "kill", "rank": 1, "at_step": 6},
    {"workers": 2, "does": "kill", "rank": 1, "at_step": 10, "tear": "weights.safetensors"},
    {"workers": 2},
)

every_case = pytest.mark.parametrize("case", CASES)


@dataclass(frozen=True)
class Outcome:
    """What befell the runs, whose folders are in ``runs``."""

    attempts: dict[str, list[Attempt]]
    runs: Path

    def final(self, name: str) -> dict[str, Tensor]:
        """Weights and moments of a run's last step."""
        newest = self.runs / name / "checkpoints" / f"step-{STEPS:08d}"
        return load_file(newest / "weights.safetensors") | load_file(newest / "optimizer.safetensors")


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory,
    launch: Launch,
    lively_model: Callable[..., Path],
    lively_job: Callable[..., JobConfig],
) -> Outcome:
    """Every case undisturbed and with two deaths; some that hang, and some that are told to end."""
    folder = tmp_path_factory.mktemp("survival")
    # With a word table so large that ZeRO-3 cuts it up even where it is frozen.
    lively_model(folder / "base", words=4000)

    def case(name: str, fate: str, *attempts: dict[str, Any], **changes: Any) -> Case:
        strategy, _, variant = name.partition("-")
        best: dict[str, Any] = {"train__metric": "loss", "train__mode": "min", "train__checkpoint_every": 2}
        changes |= best | {"model__dropout": 0.1, "scale__workers": 2, "scale__strategy": strategy}
        job = lively_job(folder, **changes | VARIANTS[variant])
        told = {"name": f"{name}-{fate}", "job": job, "run": folder / "runs" / f"{name}-{fate}"}
        return told | {"attempts": attempts or [{"workers": 2}], "largest_share": 0.0 if name == "zero3-plain" else 0.8}

    def stopped(does: str) -> dict[str, Any]:
        return {"workers": 2, "does": does, "rank": 1, "at_step": 3}

    cases = [
        *(
            case(f"{one}-plain", "hung", stopped("hang"), {"workers": 2}, scale__collective_timeout_s=5)
            for one in STRATEGIES
        ),
        *(case(name, "killed", *KILLED) for name in CASES),
        *(case(name, "whole") for name in CASES),
        *(case(f"{one}-plain", "told", stopped("term"), {"workers": 2}) for one in TOLD),
    ]
    return Outcome(launch(folder / "workers", cases), folder / "runs")


def _different(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


@every_case
def test_run_whose_worker_is_killed_twice_ends_bit_for_bit_as_one_that_was_not(outcome: Outcome, case: str) -> None:
    assert _different(outcome.final(f"{case}-killed"), outcome.final(f"{case}-whole")) == []


@every_case
def test_killed_run_goes_on_from_its_newest_checkpoint(outcome: Outcome, case: str) -> None:
    first, second, third = outcome.attempts[f"{case}-killed"]
    assert first.steps == [1, 2, 3, 4, 5]
    # Checkpoints are written beside the next steps: that of step 4 may not have been done.
    assert second.steps in ([3, *range(4, 10)], [5, *range(6, 10)])
    assert f"going on from step-{second.steps[0] - 1:08d}" in second.note
    assert third.steps == list(range(third.steps[0], STEPS + 1))
    assert third.steps[0] > 1
    for told in third.ranks:
        assert (told.facts["steps"], told.facts["stopped"]) == (STEPS, False)


@every_case
def test_torn_checkpoint_is_named_and_the_one_before_it_is_used(outcome: Outcome, case: str) -> None:
    last = outcome.attempts[f"{case}-killed"][-1]
    torn = last.note.partition("checkpoint step-")[2].partition(" ")[0]
    assert f"checkpoint step-{torn} is torn (weights.safetensors differs from its digest)" in last.note
    before = int(torn) - 2
    assert f"going on from step-{before:08d}" in last.note
    assert last.steps[0] == before + 1


@every_case
def test_killed_run_does_each_epoch_once_and_leaves_whole_checkpoints_only(outcome: Outcome, case: str) -> None:
    run = outcome.runs / f"{case}-killed"
    newest = Store(str(run), pytest.fail).newest_whole()
    assert newest is not None
    assert newest.position.step == STEPS
    assert [entry["epoch"] for entry in newest.position.history] == [1, 2]
    undisturbed = Store(str(outcome.runs / f"{case}-whole"), pytest.fail).newest_whole()
    assert undisturbed is not None
    assert newest == undisturbed
    folders = sorted((run / "checkpoints").iterdir())
    assert 1 <= len(folders) <= 2
    for folder in folders:
        files: dict[str, str] = json.loads((folder / "checkpoint.json").read_text())["files"]
        assert set(files) == {path.name for path in folder.iterdir()} - {"checkpoint.json"}
        for name, digest in files.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_worker_that_falls_silent_is_named_with_its_step_and_the_run_goes_on(outcome: Outcome, strategy: str) -> None:
    hung, after = outcome.attempts[f"{strategy}-plain-hung"]
    told = hung.ranks[0].facts["error"]
    assert told.startswith("worker 1 did not take part in an exchange: last seen at step 3, ")
    assert told.endswith("scale.collective_timeout_s is 5)")
    assert hung.steps == [1, 2]
    assert after.steps[-1] == STEPS
    assert _different(outcome.final(f"{strategy}-plain-hung"), outcome.final(f"{strategy}-plain-whole")) == []


@pytest.mark.parametrize("strategy", TOLD)
def test_sigterm_to_one_worker_ends_all_at_the_same_step_with_a_checkpoint(outcome: Outcome, strategy: str) -> None:
    told, after = outcome.attempts[f"{strategy}-plain-told"]
    for rank in told.ranks:
        assert (rank.facts["stopped"], rank.facts["steps"], rank.facts["checkpoint"]) == (True, 3, "step-00000003")
    assert after.steps == list(range(4, STEPS + 1))
    assert _different(outcome.final(f"{strategy}-plain-told"), outcome.final(f"{strategy}-plain-whole")) == []


# Names of processes.
WORKER, CONTROLLER, BOARD = "ray::RayTrainWorker", "ray::TrainController", "ray::Board"
LONE = "ray::_LoneWorker"
KILLS = (DRIVER, WORKER, CONTROLLER, WORKER, BOARD)
# Epochs of 6 steps: enough that a fast machine, too, is in the middle of them whenever it is hit.
LONG = 100


@dataclass
class Ordeal:
    """What a command went through: the kinds that were hit, in order, and how it ended of it, with which last words."""

    folder: Path
    hits: list[str] = field(default_factory=list)
    endings: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=dict)


def _strike(command: Command, kind: str, number: int, after: int) -> None:
    """Send a signal to a process of a kind once the workers are there and have saved ``after`` steps more."""
    command.until(lambda: len(command.found(WORKER)) == 2)
    goal = command.saved() + after
    command.until(lambda: command.saved() >= goal)
    command.found(kind)[-1].send_signal(number)


def _long(job: JobConfig, **changes: Any) -> JobConfig:
    """A job of 6 x LONG steps with dropout, on two workers."""
    values = {"train.epochs": LONG, "train.checkpoint_every": 3, "model.dropout": 0.1, "scale.workers": 2}
    return job.with_values(values | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, lively_job: Callable[..., JobConfig], launch: Launch
) -> tuple[JobConfig, dict[str, Tensor]]:
    """A long job, and the weights and moments that its last step leaves if nothing befalls it; without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = _long(lively_job(folder))
    launch(folder / "workers", [{"name": "whole", "job": job, "run": folder / "run"}])
    return job, _last(folder / "run")


def _last(run: Path) -> dict[str, Tensor]:
    newest = run / f"checkpoints/step-{6 * LONG:08d}"
    return load_file(newest / "weights.safetensors") | load_file(newest / "optimizer.safetensors")


@pytest.fixture(scope="module")
def ordeal(
    tmp_path_factory: pytest.TempPathFactory, undisturbed: tuple[JobConfig, dict[str, Tensor]]
) -> Iterator[Ordeal]:
    """One run of the command line, hit at six random moments, and started again by the same command."""
    folder = tmp_path_factory.mktemp("ordeal")
    job = undisturbed[0].with_values({"storage": str(folder / "runs"), "registry.root": str(folder / "registry")})
    chance, told = random.Random(3), Ordeal(folder)
    hits = [*((kind, signal.SIGKILL) for kind in KILLS), (DRIVER, signal.SIGTERM)]
    chance.shuffle(hits)
    command = Command(folder, job, "train")
    try:
        for kind, number in hits:
            _strike(command, kind, number, after=chance.randint(1, 12))
            told.hits.append(f"{kind} {number.name}")
            if kind in (DRIVER, CONTROLLER):
                ending = (command.process.wait(), command.err.read_text())
                told.endings.setdefault(told.hits[-1], []).append(ending)
                command.start()
        assert command.process.wait() == 0, command.err.read_text()
        told.answer = json.loads(command.out.read_text())
        yield told
    finally:
        command.end()


def test_command_hit_at_random_moments_and_started_again_ends_bit_for_bit_as_one_that_was_not(
    ordeal: Ordeal, undisturbed: tuple[JobConfig, dict[str, Tensor]]
) -> None:
    assert sorted(hit.split()[0] for hit in ordeal.hits if "SIGKILL" in hit) == sorted(KILLS)
    (run,) = (ordeal.folder / "runs").glob("tiny-*")
    assert _different(_last(run), undisturbed[1]) == []
    newest = Store(str(run), pytest.fail).newest_whole()
    assert newest is not None
    assert [entry["epoch"] for entry in newest.position.history] == list(range(1, LONG + 1))


def test_command_hit_at_random_moments_registers_one_version(ordeal: Ordeal) -> None:
    (version,) = Registry(str(ordeal.folder / "registry")).versions("tiny")
    assert (str(version), ordeal.answer["version"], ordeal.answer["steps"]) == ("tiny@1", "tiny@1", 6 * LONG)


def _error(said: str) -> str:
    """The line that says why a command ended; the next one says where its logs are."""
    return next(line for line in said.splitlines() if line.startswith("error: "))


def test_command_whose_controller_is_killed_says_so_in_one_line(ordeal: Ordeal) -> None:
    ((code, said),) = ordeal.endings[f"{CONTROLLER} SIGKILL"]
    assert code == 1
    assert "Traceback" not in said
    assert "controller, has died" in _error(said)
    assert _error(said).endswith("; the same command goes on")


def test_command_that_gets_a_sigterm_ends_with_a_checkpoint_and_says_of_which_step(ordeal: Ordeal) -> None:
    ((code, said),) = ordeal.endings[f"{DRIVER} SIGTERM"]
    assert code == 1
    told = re.fullmatch(
        r"error: run tiny-\w+-1 was told to end and has a checkpoint of step (\d+); the same command goes on",
        _error(said),
    )
    assert told
    assert 0 < int(told[1]) < 6 * LONG


def _working(kind: str = WORKER) -> list[psutil.Process]:
    return [found for found in psutil.Process().children(recursive=True) if name_of(found).startswith(kind)]


@pytest.mark.usefixtures("local_ray")
def test_job_for_one_to_eight_workers_takes_the_four_that_there_is_room_for(
    undisturbed: tuple[JobConfig, dict[str, Tensor]], tmp_path: Path
) -> None:
    places = {"storage": str(tmp_path / "runs"), "registry.root": str(tmp_path / "registry"), "train.epochs": 4}
    counted: list[int] = []
    job = undisturbed[0].with_values(places | {"scale.workers": [1, 8]})
    result = banjoray.train(job, watch=lambda moment: counted.append(len(_working())))
    # The Ray of the test session has four CPUs.
    assert max(counted) == 4
    assert result.steps == 4 * 6


@pytest.mark.usefixtures("local_ray")
def test_run_whose_worker_gets_a_sigterm_goes_on_by_itself_and_ends_bit_for_bit_as_one_that_did_not(
    undisturbed: tuple[JobConfig, dict[str, Tensor]], tmp_path: Path
) -> None:
    job = undisturbed[0].with_values({"storage": str(tmp_path / "runs"), "registry.root": str(tmp_path / "registry")})
    seen: list[Moment] = []

    def watch(moment: Moment) -> None:
        if not seen:
            _working()[-1].send_signal(signal.SIGTERM)
        seen.append(moment)

    banjoray.train(job, watch=watch)
    (run,) = (tmp_path / "runs").glob("tiny-*")
    assert "going on from step-" in seen[-1].note
    assert _different(_last(run), undisturbed[1]) == []


@pytest.fixture(scope="module")
def undisturbed_alone(
    tmp_path_factory: pytest.TempPathFactory, lively_job: Callable[..., JobConfig], launch: Launch
) -> tuple[JobConfig, dict[str, Tensor]]:
    """A long job of one worker, and what its last step leaves if nothing befalls it; without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed-alone")
    job = _long(lively_job(folder), scale__workers=1)
    launch(folder / "workers", [{"name": "whole", "job": job, "run": folder / "run"}])
    return job, _last(folder / "run")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_run_of_one_worker_goes_on_by_itself_after_a_signal_and_ends_bit_for_bit_as_without_one(
    undisturbed_alone: tuple[JobConfig, dict[str, Tensor]], tmp_path: Path, number: signal.Signals
) -> None:
    places = {"storage": str(tmp_path / "runs"), "registry.root": str(tmp_path / "registry")}
    job = undisturbed_alone[0].with_values(places)
    seen: list[Moment] = []

    def watch(moment: Moment) -> None:
        # Once there is a checkpoint to go on from, and long before the end.
        if moment.step > 6 and not any(earlier.step > 6 for earlier in seen):
            (worker,) = _working(LONE)
            worker.send_signal(number)
        seen.append(moment)

    banjoray.train(job, watch=watch)
    (run,) = (tmp_path / "runs").glob("tiny-*")
    assert seen[0].step < 6 * LONG
    assert "going on from step-" in seen[-1].note
    assert _different(_last(run), undisturbed_alone[1]) == []
    assert _working(LONE) == []


@pytest.mark.usefixtures("local_ray")
def test_run_of_one_worker_whose_driver_gets_a_sigterm_ends_with_a_checkpoint_and_goes_on_bit_for_bit(
    undisturbed_alone: tuple[JobConfig, dict[str, Tensor]], tmp_path: Path
) -> None:
    places = {"storage": str(tmp_path / "runs"), "registry.root": str(tmp_path / "registry")}
    job = undisturbed_alone[0].with_values(places)
    asked: list[int] = []

    def watch(moment: Moment) -> None:
        if moment.step > 6 and not asked:
            asked.append(moment.step)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="was told to end and has a checkpoint of step") as ended:
        banjoray.train(job, watch=watch)
    step = int(str(ended.value).split("of step ")[1].split(";")[0])
    assert asked[0] <= step < 6 * LONG
    assert psutil.wait_procs(_working(LONE), timeout=30)[1] == []
    seen: list[Moment] = []
    banjoray.train(job, watch=seen.append)
    assert f"going on from step-{step:08d}" in seen[-1].note
    (run,) = (tmp_path / "runs").glob("tiny-*")
    assert _different(_last(run), undisturbed_alone[1]) == []


@pytest.mark.usefixtures("local_ray")
def test_one_worker_that_dies_once_too_often_is_told_of_with_the_place_of_its_checkpoints(
    undisturbed_alone: tuple[JobConfig, dict[str, Tensor]], tmp_path: Path
) -> None:
    places = {"storage": str(tmp_path / "runs"), "registry.root": str(tmp_path / "registry")}
    job = undisturbed_alone[0].with_values(places | {"scale.max_failures": 1})
    killed: list[int] = []

    def watch(moment: Moment) -> None:  # noqa: ARG001
        for worker in _working(LONE):
            if worker.pid not in killed:
                killed.append(worker.pid)
                worker.kill()

    with pytest.raises(TrainingFailed, match=r"the worker failed: .*Checkpoints so far: .*/checkpoints"):
        banjoray.train(job, watch=watch)
    assert len(killed) == 2
