"""Two workers learn what one would have learned, and each strategy is what it says it is.

The loop runs without Ray, in real processes over gloo: dropout 0, fp32, and an epsilon of AdamW that hides the
rounding noise in gradients that are really zero (the bias of the key projection).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from banjoray.config.job import JobConfig

Told = dict[str, Any]

STRATEGIES = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"train__gradient_accumulation_steps": 2},
    "frozen": {"freeze": {"layers": 2}},
    "lora": {"adapter": {"type": "lora", "dropout": 0.0}},
    "uneven": {"train__batch_size": 20},
    "narrow": {},
}
CASES = (
    *(f"{strategy}-{variant}" for strategy in STRATEGIES for variant in VARIANTS),
    "zero2-offloaded",
    "zero3-offloaded",
)
BOUND = 1e-5

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_case = pytest.mark.parametrize("case", CASES)


@dataclass(frozen=True)
class Outcome:
    """What one worker and two workers told, case by case, and the weights they all started from."""

    alone: dict[str, list[Told]]
    paired: dict[str, list[Told]]
    base: dict[str, Tensor]
    runs: Path


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory,
    launch: Callable[..., dict[str, list[Told]]],
    lively_model: Callable[..., Path],
    lively_job: Callable[..., JobConfig],
) -> Outcome:
    """Every case on two workers, and each variant on one."""
    folder = tmp_path_factory.mktemp("parity")
    # A word table above ZeRO-3's threshold: smaller parameters stay whole on every rank.
    base = lively_model(folder / "base", words=4000)

    def case(workers: int, name: str) -> dict[str, Any]:
        strategy, _, variant = name.partition("-")
        changes = VARIANTS.get(variant, {"scale__offload": "cpu"})
        # The best checkpoint by loss: two scores that agree in F1 could still name different checkpoints.
        best: dict[str, Any] = {"train__metric": "loss", "train__mode": "min"}
        job = lively_job(folder, scale__workers=workers, scale__strategy=strategy, **best, **changes)
        # Whole word tables but in the variant that is about them.
        share = 0.8 if variant == "narrow" else 0.0
        return {"name": name, "job": job, "run": folder / "runs" / f"{name}-{workers}", "largest_share": share}

    return Outcome(
        launch(folder / "alone", [case(1, f"ddp-{variant}") for variant in VARIANTS]),
        launch(folder / "paired", [case(2, name) for name in CASES]),
        load_file(base / "model.safetensors"),
        folder / "runs",
    )


def _one_worker(outcome: Outcome, case: str) -> Told:
    return outcome.alone[_alone(case)][0]


def _alone(case: str) -> str:
    """One worker's case that a case of two is compared with: offloading changes nothing for it."""
    variant = case.partition("-")[2]
    return f"ddp-{variant if variant in VARIANTS else 'plain'}"


def _farthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> tuple[float, str]:
    assert left.keys() == right.keys()
    return max((float((left[name] - right[name]).abs().max()), name) for name in left)


@every_case
def test_two_workers_hold_exactly_the_same_weights(outcome: Outcome, case: str) -> None:
    first, second = outcome.paired[case]
    assert first["weights"].keys() == second["weights"].keys()
    assert [name for name, tensor in first["weights"].items() if not torch.equal(tensor, second["weights"][name])] == []


@every_case
def test_two_workers_learn_every_weight_that_one_worker_learns(outcome: Outcome, case: str) -> None:
    difference, name = _farthest(outcome.paired[case][0]["weights"], _one_worker(outcome, case)["weights"])
    assert difference <= BOUND, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_moves_the_weights_far_beyond_the_parity_bound(outcome: Outcome, variant: str) -> None:
    learned = outcome.alone[f"ddp-{variant}"][0]["weights"]
    moved = {name: tensor for name, tensor in outcome.base.items() if f"bert.{name}" in learned}
    difference, _ = _farthest(moved, {name: learned[f"bert.{name}"] for name in moved})
    assert difference > 100 * BOUND


@every_case
def test_metrics_of_two_workers_are_those_of_one(outcome: Outcome, case: str) -> None:
    one = _one_worker(outcome, case)
    for told in outcome.paired[case]:
        assert told["metrics"] == pytest.approx(one["metrics"], abs=BOUND)
        assert (told["checkpoint"], told["steps"]) == (one["checkpoint"], one["steps"])


@every_case
def test_checkpoint_of_two_workers_holds_the_weights_and_moments_of_one(outcome: Outcome, case: str) -> None:
    for file in ("weights.safetensors", "optimizer.safetensors"):
        saved = [
            load_file(outcome.runs / run / "checkpoints" / outcome.paired[case][0]["checkpoint"] / file)
            for run in (f"{case}-2", f"{_alone(case)}-1")
        ]
        difference, name = _farthest(*saved)
        assert difference <= BOUND, f"{file}: {name}"


@every_strategy
def test_frozen_weights_stay_bit_for_bit_those_of_the_base_model(outcome: Outcome, strategy: str) -> None:
    below = ("embeddings.", "encoder.layer.0.", "encoder.layer.1.")
    frozen = {f"bert.{name}": tensor for name, tensor in outcome.base.items() if name.startswith(below)}
    assert len(frozen) > 10
    for told in outcome.paired[f"{strategy}-frozen"]:
        assert [name for name, tensor in frozen.items() if not torch.equal(tensor, told["weights"][name])] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_ddp_on_two_workers_is_distributed_data_parallel(outcome: Outcome, variant: str) -> None:
    for told in outcome.paired[f"ddp-{variant}"]:
        assert told["seen"]["wrapped"] == "torch.nn.parallel.distributed.DistributedDataParallel"
        assert told["seen"]["workers"] == 2


@pytest.mark.parametrize("stage", range(4))
def test_zero_is_a_deepspeed_engine_at_its_stage(outcome: Outcome, stage: int) -> None:
    for told in outcome.paired[f"zero{stage}-plain"]:
        assert told["seen"]["wrapped"] == "deepspeed.runtime.engine.DeepSpeedEngine"
        assert (told["seen"]["stage"], told["seen"]["workers"]) == (stage, 2)


@pytest.mark.parametrize("case", [case for case in CASES if case.partition("-")[0] in ("zero1", "zero2", "zero3")])
def test_each_rank_holds_half_of_the_optimizer_state(outcome: Outcome, case: str) -> None:
    told = [told["seen"] for told in outcome.paired[case]]
    trainable = told[0]["trainable"]
    for seen in told:
        # DeepSpeed pads what it cuts: a group of parameters, or under ZeRO-3 each of them.
        assert trainable / 2 - 100 <= seen["held"] <= trainable / 2 + 100
    assert sum(seen["held"] for seen in told) >= trainable


@pytest.mark.parametrize("strategy", ["ddp", "zero0"])
def test_without_sharding_each_rank_holds_the_whole_optimizer_state(outcome: Outcome, strategy: str) -> None:
    for told in outcome.paired[f"{strategy}-plain"]:
        assert told["seen"]["held"] == told["seen"]["trainable"] > 0


@pytest.mark.parametrize("variant", [*VARIANTS, "offloaded"])
def test_zero3_cuts_parameters_between_the_ranks(outcome: Outcome, variant: str) -> None:
    for told in outcome.paired[f"zero3-{variant}"]:
        whole = sum(tensor.numel() for tensor in told["weights"].values())
        assert whole / 2 <= told["seen"]["pieces"] <= whole / 2 + len(told["weights"])
        assert told["seen"]["released"] == ["bert.embeddings.word_embeddings.weight"]
