"""Several labels per text, and numbers, on two workers: they learn what one learns, also after a stop."""

from pathlib import Path
from typing import Any

import pytest
import torch

from banjoray.training.checkpoints import Store
from launched import Attempt, Case, Launch
from problems import problem_job

PROBLEMS = ("multi_label", "regression")
BOUND = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("problems")


@pytest.fixture(scope="module")
def outcome(folder: Path, launch: Launch) -> dict[str, Attempt]:
    """The last attempt at every case: alone, paired, and paired but stopped in the middle of an epoch."""

    def case(problem: str, how: str, workers: int, **changes: Any) -> dict[str, Any]:
        usual: dict[str, Any] = {"train__learning_rate": 1e-3}
        if how == "kept":
            usual |= {"freeze": {"layers": 1}, "cache__prefix": "always"}
        job = problem_job(folder / problem, problem, scale__workers=workers, train__epochs=2, **usual)
        return {"name": f"{problem}-{how}", "job": job, "run": folder / "runs" / problem / how, **changes}

    stopped = [{"workers": 2, "rank": 0, "does": "term", "at_step": 6}, {"workers": 2}]
    cases: list[Case] = [
        told
        for problem in PROBLEMS
        for told in (
            case(problem, "alone", 1),
            case(problem, "paired", 2),
            case(problem, "stopped", 2, attempts=stopped),
            case(problem, "kept", 2),
        )
    ]
    return {name: attempts[-1] for name, attempts in launch(folder / "logs", cases).items()}


@pytest.mark.parametrize("how", ["paired", "stopped"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_two_workers_learn_what_one_learns(outcome: dict[str, Attempt], problem: str, how: str) -> None:
    expected = outcome[f"{problem}-alone"].ranks[0]
    for rank in outcome[f"{problem}-{how}"].ranks:
        # A correlation of ranks jumps where rounding turns two predictions round.
        assert rank.facts["metrics"] == pytest.approx(expected.facts["metrics"], abs=1e-3)
        for weight, found in rank.weights.items():
            torch.testing.assert_close(found, expected.weights[weight], rtol=0, atol=BOUND, msg=weight)


def test_the_thresholds_are_in_the_checkpoint_of_every_run(folder: Path, outcome: dict[str, Attempt]) -> None:
    assert outcome
    for problem in PROBLEMS:
        runs = {how: str(folder / "runs" / problem / how) for how in ("alone", "paired", "stopped", "kept")}
        found = {how: Store(run, pytest.fail).all()[-1].thresholds for how, run in runs.items()}
        assert found["alone"].keys() == ({"home", "school", "sea"} if problem == "multi_label" else set())
        for how in ("paired", "stopped"):
            assert found[how] == pytest.approx(found["alone"], abs=1e-4)
        assert all(0 < threshold < 1 for threshold in found["kept"].values())
