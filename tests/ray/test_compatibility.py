"""Every way to train that the rules allow on CPUs, tried by two workers over gloo: all in one process group, once."""

from collections.abc import Mapping
from typing import Any

import pytest

from banjoray.training.compatibility import AXES, Cell, cells, refusals
from cells import Case, Told, case_of, run_cases

CELLS = {case_of(cell).name: case_of(cell) for cell in cells() if cell.device == "cpu" and not refusals(cell)}


def plain(strategy: str, freeze: str, adapter: str) -> Case:
    return case_of(Cell(strategy, freeze, adapter, "fp32", "none", "cpu"))


def changed(case: Case, name: str, like: str, poisoned: bool = False, **values: Any) -> Case:
    """A case with more keys (``__`` for the dot), compared with the case ``like``."""
    keys = {key.replace("__", "."): value for key, value in values.items()}
    return Case(f"{case.name}-{name}", case.values | keys, like, poisoned)


def other_cases() -> list[Case]:
    """Rules about keys that are no part of a cell: what they leave alone works too."""
    found = []
    for strategy in AXES["strategy"]:
        if strategy != "zero0":
            case, ddp = plain(strategy, "layers", "none"), plain("ddp", "layers", "none")
            found += [changed(case, "broken", f"{ddp.name}-broken", poisoned=True, train__max_skipped_steps=1)]
        for freeze, adapter in (("none", "none"), ("layers", "lora")):
            case = plain(strategy, freeze, adapter)
            found += [changed(case, "recomputed", case.like, train__gradient_checkpointing=True)]
    for strategy, adapter in (*((s, "lora") for s in AXES["strategy"]), *(("ddp", a) for a in AXES["adapter"][2:])):
        case = plain(strategy, "none", adapter)
        found += [changed(case, "decayed", f"{case.like}-decayed", train__layerwise_lr_decay=0.8)]
    return found


OTHERS = {case.name: case for case in other_cases()}


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Told]:
    """Every case, by its name."""
    return run_cases(tmp_path_factory.mktemp("cells"), [*CELLS.values(), *OTHERS.values()], workers=2)


@pytest.mark.parametrize("name", CELLS)
def test_an_allowed_cell_trains_what_it_should_and_as_ddp_does(tried: Mapping[str, Told], name: str) -> None:
    if tried[name].missing:
        pytest.skip(tried[name].missing)
    assert tried[name].complaints(CELLS[name]) == []


@pytest.mark.parametrize("name", OTHERS)
def test_a_broken_step_is_undone_and_recomputing_and_decay_go_with_every_strategy(
    tried: Mapping[str, Told], name: str
) -> None:
    assert tried[name].complaints(OTHERS[name]) == []
