"""Averages through shared memory, by three real processes."""

import json
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
}
NOT_HERE: dict[str, dict[str, Any]] = {
    "no such folder": {"cells": 10, "most": 10, "memory": "none"},
    "another host": {"cells": 10, "most": 10, "elsewhere": True},
    "no room": {"cells": 1000, "most": 1000, "bytes": 1000},
}


@dataclass(frozen=True)
class Outcome:
    """What every rank told, case by case, and the folder that the shared files were in."""

    told: dict[str, list[list[list[float]]]]
    memory: Path


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("averages")
    memory = folder / "memory"
    memory.mkdir()
    cases = [case | {"memory": str(folder / case.get("memory", "memory"))} for case in (HERE | NOT_HERE).values()]
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
    assert [rank.returncode for rank in ranks] == [0] * RANKS
    return Outcome({name: [lines[n] for lines in told] for n, name in enumerate(HERE | NOT_HERE)}, memory)


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


def test_no_file_is_left(outcome: Outcome) -> None:
    assert list(outcome.memory.iterdir()) == []
