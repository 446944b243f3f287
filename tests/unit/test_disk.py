"""Trials stay within their study's disk budget; the best one is never what makes room."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.errors import ConfigError
from banjoray.training.checkpoints import Position, Store
from banjoray.tuning.disk import Janitor, shared

SIZE = 1000


def job(budget: float | None, **train: Any) -> JobConfig:
    tune = {"space": {"train.learning_rate": {"choice": [1e-4, 1e-3]}}, "disk_budget_gib": budget}
    tree = {"name": "any", "task": "text-classification", "data": {"source": "banjoray:emotion"}, "tune": tune}
    return validate(JobConfig, tree | {"train": {"metric": "accuracy"} | train}, "test job")


def trial(folder: Path, scores: Mapping[int, float]) -> str:
    """A folder with a checkpoint for each step, of SIZE bytes."""

    def write(place: Path) -> None:
        (place / "w").write_bytes(b"w" * SIZE)

    store = Store(str(folder), pytest.fail)
    for step, score in scores.items():
        store.save(Position(step=step), {"accuracy": score}, "", write)
    return str(folder)


def left(folder: str) -> list[int]:
    return [checkpoint.position.step for checkpoint in Store(folder, pytest.fail).all()]


def test_finished_trial_keeps_its_best_checkpoint_and_its_last(tmp_path: Path) -> None:
    folder = trial(tmp_path / "a", {1: 0.2, 2: 0.9, 3: 0.4, 4: 0.5})
    janitor = Janitor(job(None), 1)
    janitor.tidy({"a": folder})
    assert left(folder) == [2, 4]
    assert janitor.freed >= 2 * SIZE


def test_worst_trials_go_until_the_rest_fits_and_the_best_one_stays(tmp_path: Path) -> None:
    folders = {
        name: trial(tmp_path / name, {1: score, 2: score - 0.1})
        for name, score in (("a", 0.5), ("b", 0.9), ("c", 0.3), ("d", 0.7))
    }
    # Two shares, of two trials each.
    janitor = Janitor(job(2 * 4 * SIZE / 2**30), 1)
    janitor.tidy(folders)
    assert {name: left(folder) for name, folder in folders.items()} == {"a": [], "b": [1, 2], "c": [], "d": [1, 2]}
    assert janitor.freed >= 4 * SIZE


def test_best_checkpoint_of_the_best_trial_stays_where_nothing_else_fits(tmp_path: Path) -> None:
    folders = {name: trial(tmp_path / name, {1: score, 2: 0.1}) for name, score in (("a", 0.5), ("b", 0.9))}
    Janitor(job(2 * 1.5 * SIZE / 2**30), 1).tidy(folders)
    assert {name: left(folder) for name, folder in folders.items()} == {"a": [], "b": [1]}


def test_every_trial_at_once_and_all_that_are_done_have_equal_shares() -> None:
    assert shared(job(6.0), 2).train.checkpoint_budget_gib == 2.0
    assert shared(job(6.0, checkpoint_budget_gib=1.5), 2).train.checkpoint_budget_gib == 1.5
    assert shared(job(None), 2) == job(None)


def test_checkpoints_that_ask_for_more_than_their_share_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.checkpoint_budget_gib: found 3; tune\.disk_budget_gib 6 leaves 2"):
        shared(job(6.0, checkpoint_budget_gib=3.0), 2)
