"""Averages through shared memory, by three real processes."""

import json
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import averaging
from averaging import numbers

RANKS = 3
HERE: dict[str, dict[str, Any]] = {
    "at once": {"cells": 1000, "most": 1000},
    "in parts": {"cells": 1000, "most": 64},
    "fewer than workers": {"cells": 2, "most": 64},
    "one": {"cells": 1, "most": 64},
    # Of three slots of 800 cells, 9,600 bytes, and of three of 100.
    "room for an eighth": {"cells": 800, "most": 800, "bytes": 2000},
}
NOT_HERE: dict[str, dict[str, Any]] = {
    "no such folder": {"cells": 10, "most": 10, "memory": "none"},
    "another host": {"cells": 10, "most": 10, "elsewhere": True},
    "no room": {"cells": 1000, "most": 1000, "bytes": 1000},
}
# The last rank dies when it has added up its part and before it tells the others.
DYING: dict[str, dict[str, Any]] = {"killed": {"cells": 1000, "most": 1000, "dies": 2}}
CASES = HERE | NOT_HERE | DYING


@dataclass(frozen=True)
class Outcome:
    """What every rank told, case by case, and the folder that the shared files were in."""

    told: dict[str, list[list[Any]]]
    memory: Path


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("averages")
    memory = folder / "memory"
    memory.mkdir()
    cases = [case | {"memory": str(folder / case.get("memory", "memory"))} for case in CASES.values()]
    command = [sys.executable, averaging.__file__]
    plan = folder / "plan"
    plan.write_text("\n".join(json.dumps(case) for case in cases))
    outputs = [folder / f"rank{rank}" for rank in range(RANKS)]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, str(rank), str(RANKS), str(folder / "store")],
                    stdin=stack.enter_context(plan.open()),
                    stdout=stack.enter_context(output.open("w")),
                )
            )
            for rank, output in enumerate(outputs)
        ]
    told = [[json.loads(line) for line in output.read_text().splitlines()] for output in outputs]
    assert [rank.returncode for rank in ranks] == [0] * (RANKS - 1) + [-signal.SIGKILL]
    return Outcome({name: [lines[n] for lines in told if n < len(lines)] for n, name in enumerate(CASES)}, memory)


@pytest.mark.parametrize("name", HERE)
def test_every_rank_gets_the_mean_of_all_twice_and_to_the_bit(outcome: Outcome, name: str) -> None:
    cells = HERE[name]["cells"]
    mean = torch.stack([numbers(rank, cells) for rank in range(RANKS)]).mean(dim=0)
    first, *others = outcome.told[name]
    assert len(first) == 2
    assert first[0] == first[1]
    assert [other == first for other in others] == [True] * (RANKS - 1)
    assert torch.allclose(torch.tensor(first[0]), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NOT_HERE)
def test_no_rank_shares_memory_where_one_can_not(outcome: Outcome, name: str) -> None:
    assert outcome.told[name] == [[]] * RANKS


def test_the_others_are_told_by_gloo_that_a_rank_died_in_the_middle(outcome: Outcome) -> None:
    told = outcome.told["killed"]
    assert [len(lines) for lines in told] == [1] * (RANKS - 1)
    # The word by which `Pulse.blame` knows a lost worker.
    assert all("gloo" in lines[0] for lines in told)


def test_no_file_is_left(outcome: Outcome) -> None:
    assert list(outcome.memory.iterdir()) == []
