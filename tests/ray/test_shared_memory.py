"""Steps in shared memory, by three real processes."""

import json
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import stepping
from stepping import RATE, STEPS, gradients, weights

RANKS = 3
HERE: dict[str, dict[str, Any]] = {
    "even": {"sizes": [100, 100, 100]},
    "uneven": {"sizes": [1, 700, 3, 40, 40, 40, 900, 5]},
    "more workers than parameters": {"sizes": [50]},
    "one number": {"sizes": [1]},
    "unused": {"sizes": [30, 20, 10, 40], "unused": [0, 2]},
    "used by one": {"sizes": [30, 20, 10, 40], "rare": [1, 3]},
    "in microbatches": {"sizes": [30, 20, 10, 40], "rare": [1], "microbatches": 4},
}
NOT_HERE: dict[str, dict[str, Any]] = {
    "another host": {"sizes": [10], "host": True},
    "files of others stay closed": {"sizes": [10], "open": True},
    "no room": {"sizes": [1000], "bytes": 1000},
    "not fp32": {"sizes": [10], "double": True},
}
# The last rank dies when it has meant its part and before it tells the others.
DYING: dict[str, dict[str, Any]] = {"killed": {"sizes": [300, 300, 300], "dies": 2}}
CASES = HERE | NOT_HERE | DYING
Told = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What every rank told, case by case."""
    folder = tmp_path_factory.mktemp("steps")
    plan = folder / "plan"
    plan.write_text("\n".join(json.dumps(case) for case in CASES.values()))
    outputs = [folder / f"rank{rank}" for rank in range(RANKS)]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, stepping.__file__, str(rank), str(RANKS), str(folder / "store")],
                    stdin=stack.enter_context(plan.open()),
                    stdout=stack.enter_context(output.open("w")),
                )
            )
            for rank, output in enumerate(outputs)
        ]
    lines = [[json.loads(line) for line in output.read_text().splitlines()] for output in outputs]
    assert [rank.returncode for rank in ranks] == [0] * (RANKS - 1) + [-signal.SIGKILL]
    return {name: [rank[number] for rank in lines if number < len(rank)] for number, name in enumerate(CASES)}


@pytest.mark.parametrize("name", HERE)
def test_every_rank_ends_with_the_weights_of_one_that_steps_all(told: Told, name: str) -> None:
    case, expected = HERE[name], weights(HERE[name])
    brought = list(zip(*(gradients(case, rank) for rank in range(RANKS)), strict=True))
    means = [
        torch.stack([one if one is not None else torch.zeros_like(whole) for one in theirs]).mean(dim=0)
        for theirs, whole in zip(brought, expected, strict=True)
    ]
    first, *others = [rank["steps"] for rank in told[name]]
    assert len(first) == STEPS
    for step in range(STEPS):
        for weight, mean in zip(expected, means, strict=True):
            weight.sub_(mean, alpha=RATE)
        norm, _, found, _ = first[step]
        assert norm == pytest.approx(float(torch.linalg.vector_norm(torch.cat(means))), rel=1e-5)
        assert all(
            torch.allclose(torch.tensor(one), two, rtol=1e-5, atol=1e-6)
            for one, two in zip(found, expected, strict=True)
        )
        # To the bit.
        assert [[steps[step][0], steps[step][2]] for steps in others] == [[norm, found]] * (RANKS - 1)


@pytest.mark.parametrize("name", HERE)
def test_every_parameter_that_is_used_is_stepped_by_one_rank(told: Told, name: str) -> None:
    used = [number for number in range(len(HERE[name]["sizes"])) if number not in HERE[name].get("unused", [])]
    assert sorted(number for rank in told[name] for number in rank["steps"][0][1]) == used


@pytest.mark.parametrize("name", HERE)
def test_what_is_gathered_is_of_who_steps_it_on_every_rank(told: Told, name: str) -> None:
    owners = {number: rank for rank, line in enumerate(told[name]) for number in line["steps"][0][1]}
    expected = [[float(owners.get(number, 0))] * size for number, size in enumerate(HERE[name]["sizes"])]
    assert [line["steps"][step][3] for line in told[name] for step in range(STEPS)] == [expected] * RANKS * STEPS


def test_parts_are_about_equal(told: Told) -> None:
    assert [rank["steps"][0][1] for rank in told["even"]] == [[0], [1], [2]]


@pytest.mark.parametrize("name", NOT_HERE)
def test_no_rank_shares_memory_where_one_can_not(told: Told, name: str) -> None:
    assert [rank["steps"] for rank in told[name]] == [[]] * RANKS


def test_the_others_are_told_by_gloo_that_a_rank_died_in_the_middle(told: Told) -> None:
    lines = [rank["steps"] for rank in told["killed"]]
    assert [len(steps) for steps in lines] == [1] * (RANKS - 1)
    # The word by which `Pulse.blame` knows a lost worker.
    assert all("gloo" in steps[0] for steps in lines)


@pytest.mark.parametrize("name", CASES)
def test_memory_goes_with_the_parameters(told: Told, name: str) -> None:
    assert [rank["left"] for rank in told[name]] == [0] * len(told[name])
