"""Fill-mask on two workers: masks don't depend on who draws them, and a head that shares the word table stays tied."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from launched import Attempt, Launch
from masked import masked_base, masked_job

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
ROWS_TABLE = "bert.embeddings.word_embeddings.weight"
BOUND = 1e-5


@dataclass(frozen=True)
class Outcome:
    """What one worker told, two of each strategy, and two that were stopped in an epoch and went on."""

    alone: Attempt
    paired: dict[str, list[Attempt]]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Outcome:
    folder = tmp_path_factory.mktemp("masked")
    # A table above ZeRO-3's threshold: smaller parameters stay whole on every rank.
    masked_base(folder / "base", vocab_size=4000)

    def case(name: str, strategy: str, workers: int = 2, **changes: Any) -> dict[str, Any]:
        whole: dict[str, Any] = {"train__masking": {"share": 0.3, "whole_words": True}, "train__batch_size": 12}
        job = masked_job(folder, scale__workers=workers, scale__strategy=strategy, train__epochs=2, **whole)
        return {"name": name, "job": job, "run": folder / "runs" / name, **changes}

    stopped = [{"workers": 2, "rank": 0, "does": "term", "at_step": 6}, {"workers": 2}]
    alone = launch(folder / "alone", [case("alone", "ddp", workers=1)])["alone"][0]
    cases: list[Mapping[str, Any]] = [
        *(case(strategy, strategy) for strategy in STRATEGIES),
        case("stopped", "ddp", attempts=stopped),
    ]
    return Outcome(alone, launch(folder / "paired", cases))


@pytest.mark.parametrize("name", [*STRATEGIES, "stopped"])
def test_two_workers_learn_what_one_learns(outcome: Outcome, name: str) -> None:
    expected = outcome.alone.ranks[0]
    for rank in outcome.paired[name][-1].ranks:
        assert rank.facts["steps"] == expected.facts["steps"] == 8
        assert rank.facts["metrics"] == pytest.approx(expected.facts["metrics"], rel=1e-4)
        for weight, found in rank.weights.items():
            torch.testing.assert_close(found, expected.weights[weight], rtol=0, atol=BOUND, msg=f"{name}: {weight}")


def test_the_whole_table_was_trained_and_the_stop_came_within_an_epoch(outcome: Outcome) -> None:
    start, end = outcome.alone.ranks[0].start[ROWS_TABLE], outcome.alone.ranks[0].weights[ROWS_TABLE]
    assert start.shape == end.shape == (4000, 32)
    # Every word is an answer that could have been given.
    assert (end[5:] - start[5:]).abs().max(1).values.min() > 0
    first, second = outcome.paired["stopped"]
    assert first.steps[-1] == 6
    assert second.steps == [7, 8]
