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
from banjoray.errors import TrainingFailed
from banjoray.training.checkpoints import Checkpoint, Store
from banjoray.training.export import export
from banjoray.training.learned import ROWS
from banjoray.training.parallel import DataParallel
from banjoray.training.preflight import prepare
from launched import Attempt, Launch, Told

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"train__gradient_accumulation_steps": 2},
    "frozen": {"freeze": {"layers": 2}},
    "lora": {"adapter": {"type": "lora", "dropout": 0.0}},
    "uneven": {"train__batch_size": 20},
    "narrow": {},
    "cached": {"freeze": {"layers": 2}, "cache__prefix": "always"},
}
OTHERS: dict[str, dict[str, Any]] = {"offloaded": {"scale__offload": "cpu"}}
# Sockets: ddp as where workers can't share memory, which is what GPUs do.
CASES = (
    *(f"{strategy}-{variant}" for strategy in (*STRATEGIES, "sockets") for variant in VARIANTS),
    "zero0-plain",
    "zero0-accumulated",
    "zero2-offloaded",
    "zero3-offloaded",
)
BOUND = 1e-5

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_case = pytest.mark.parametrize("case", CASES)


def cases_of(*strategies: str) -> list[str]:
    return [case for case in CASES if case.partition("-")[0] in strategies]


@dataclass(frozen=True)
class Outcome:
    """What one worker and two workers told, case by case, and the weights of the base model."""

    alone: dict[str, list[Attempt]]
    paired: dict[str, list[Attempt]]
    base: dict[str, Tensor]
    runs: Path
    job: Callable[[str], JobConfig]

    def ranks(self, case: str) -> list[Told]:
        """Both of two workers."""
        return self.paired[case][0].ranks

    def one(self, case: str) -> Told:
        """The worker that did alone what two did in a case."""
        return self.alone[_alone(case)][0].ranks[0]


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory,
    launch: Launch,
    lively_model: Callable[..., Path],
    lively_job: Callable[..., JobConfig],
) -> Outcome:
    """Every case on two workers, and each variant on one."""
    folder = tmp_path_factory.mktemp("parity")
    # A word table above ZeRO-3's threshold: smaller parameters stay whole on every rank.
    base = lively_model(folder / "base", words=4000)

    def job(name: str, workers: int = 2) -> JobConfig:
        strategy, _, variant = name.replace("sockets-", "ddp-").partition("-")
        changes = (VARIANTS | OTHERS)[variant]
        # The best checkpoint by loss: two scores that agree in F1 could still name different checkpoints.
        best: dict[str, Any] = {"train__metric": "loss", "train__mode": "min"}
        return lively_job(folder, scale__workers=workers, scale__strategy=strategy, **best, **changes)

    def case(workers: int, name: str) -> dict[str, Any]:
        # Whole word tables but in the variant that is about them.
        share = 0.8 if name.endswith("-narrow") else 0.0
        run = folder / "runs" / f"{name}-{workers}"
        sockets = name.startswith("sockets-")
        return {"name": name, "job": job(name, workers), "run": run, "largest_share": share, "sockets": sockets}

    return Outcome(
        launch(folder / "alone", [case(1, f"ddp-{variant}") for variant in VARIANTS]),
        launch(folder / "paired", [case(2, name) for name in CASES]),
        load_file(base / "model.safetensors"),
        folder / "runs",
        job,
    )


def _alone(case: str) -> str:
    """One worker's case that a case of two is compared with: offloading changes nothing for it."""
    variant = case.partition("-")[2]
    return f"ddp-{variant if variant in VARIANTS else 'plain'}"


def _farthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> tuple[float, str]:
    assert left.keys() == right.keys()
    return max((float((left[name] - right[name]).abs().max()), name) for name in left)


def _different(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def _files(run: Path, told: Told) -> Path:
    """The folder of the checkpoint that a rank told of."""
    name: str = told.facts["checkpoint"]
    return run / "checkpoints" / name


@every_case
def test_two_workers_hold_exactly_the_same_weights(outcome: Outcome, case: str) -> None:
    first, second = outcome.ranks(case)
    assert _different(first.weights, second.weights) == []


@every_case
def test_two_workers_learn_every_weight_that_one_worker_learns(outcome: Outcome, case: str) -> None:
    difference, name = _farthest(outcome.ranks(case)[0].weights, outcome.one(case).weights)
    assert difference <= BOUND, name


@every_strategy
def test_two_workers_learn_from_kept_states_what_they_learn_from_words(outcome: Outcome, strategy: str) -> None:
    kept, online = (outcome.ranks(f"{strategy}-{variant}")[0].weights for variant in ("cached", "frozen"))
    difference, name = _farthest(kept, online)
    assert difference <= BOUND, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_moves_what_is_trained_far_beyond_the_parity_bound(outcome: Outcome, variant: str) -> None:
    told = outcome.one(f"ddp-{variant}")
    learned, start = told.weights, told.start
    moved = {name: float((learned[name] - start[name]).abs().max()) for name in start}
    saved = load_file(_files(outcome.runs / f"ddp-{variant}-1", told) / "weights.safetensors")
    # All but the bias of the key projection, whose true gradient is zero.
    trained = [name for name in saved if name != ROWS and ".key.bias" not in name]
    assert [name for name in trained if moved[name] < 100 * BOUND] == []
    assert len(trained) > 10
    # What no checkpoint holds did not move.
    assert max([0.0, *(distance for name, distance in moved.items() if name not in saved)]) == 0


@every_case
def test_metrics_of_two_workers_are_those_of_one(outcome: Outcome, case: str) -> None:
    one = outcome.one(case).facts
    for told in outcome.ranks(case):
        assert told.facts["metrics"] == pytest.approx(one["metrics"], abs=BOUND)
        assert (told.facts["checkpoint"], told.facts["steps"]) == (one["checkpoint"], one["steps"])


@every_case
def test_checkpoint_of_two_workers_holds_the_weights_and_moments_of_one(outcome: Outcome, case: str) -> None:
    for file in ("weights.safetensors", "optimizer.safetensors"):
        saved = [
            load_file(_files(outcome.runs / run, outcome.one(case)) / file)
            for run in (f"{case}-2", f"{_alone(case)}-1")
        ]
        difference, name = _farthest(*saved)
        assert difference <= BOUND, f"{file}: {name}"


@every_strategy
def test_frozen_weights_stay_bit_for_bit_those_of_the_base_model(outcome: Outcome, strategy: str) -> None:
    below = ("embeddings.", "encoder.layer.0.", "encoder.layer.1.")
    frozen = {f"bert.{name}": tensor for name, tensor in outcome.base.items() if name.startswith(below)}
    assert len(frozen) > 10
    for told in outcome.ranks(f"{strategy}-frozen"):
        assert _different(frozen, {name: tensor for name, tensor in told.weights.items() if name in frozen}) == []


@every_strategy
def test_under_lora_every_weight_stays_bit_for_bit_that_of_the_base_model(outcome: Outcome, strategy: str) -> None:
    for told in outcome.ranks(f"{strategy}-lora"):
        named = {name.replace(".base_layer.", ".").removeprefix("bert."): t for name, t in told.weights.items()}
        found = {name: tensor for name, tensor in named.items() if name in outcome.base}
        # A classifier has no use for some of them, as BERT's pooler has for a language model.
        assert _different(outcome.base, found) == []
        assert {name for name in named if name not in found and "lora_" not in name} == {
            "classifier.weight",
            "classifier.bias",
        }


def _exported(outcome: Outcome, case: str, folder: Path) -> tuple[Checkpoint, dict[str, Tensor]]:
    """A run's checkpoint, and the whole model that is made of it."""
    run, told = outcome.runs / f"{case}-2", outcome.ranks(case)[0]
    (checkpoint,) = [found for found in Store(str(run), pytest.fail).all() if found.name == told.facts["checkpoint"]]
    job = outcome.job(case)
    start = prepare(job).start
    export(job, start.model(), start.tokenizer, checkpoint, _files(run, told), folder)
    return checkpoint, load_file(folder / "model.safetensors")


@every_strategy
def test_model_trained_on_the_words_in_use_is_the_one_trained_on_the_whole_table(
    outcome: Outcome, strategy: str, tmp_path: Path
) -> None:
    checkpoint, narrow = _exported(outcome, f"{strategy}-narrow", tmp_path / "narrow")
    other, whole = _exported(outcome, f"{strategy}-plain", tmp_path / "whole")
    assert checkpoint.name == other.name
    difference, name = _farthest(narrow, whole)
    assert difference <= BOUND, name
    saved = load_file(outcome.runs / f"{strategy}-narrow-2/checkpoints" / checkpoint.name / "weights.safetensors")
    table, rows = "bert.embeddings.word_embeddings.weight", saved[ROWS]
    assert len(rows) == len(saved[table]) < 0.8 * len(narrow[table])
    unused = torch.ones(len(narrow[table]), dtype=torch.bool).index_fill(0, rows, False)
    base = outcome.base["embeddings.word_embeddings.weight"]
    assert checkpoint.position.decay < 1 - 1e-5
    assert torch.equal(narrow[table][unused], base[unused] * checkpoint.position.decay)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ddp_without_shared_memory_is_distributed_data_parallel(outcome: Outcome, variant: str) -> None:
    for told in outcome.ranks(f"sockets-{variant}"):
        assert told.seen["wrapped"] == "torch.nn.parallel.distributed.DistributedDataParallel"
        assert (told.seen["together"], told.seen["workers"]) == (False, 2)


def test_workers_that_accelerate_does_not_see_as_one_group_do_not_train_apart(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lively_model: Callable[..., Path],
    lively_job: Callable[..., JobConfig],
) -> None:
    lively_model(tmp_path / "base")
    job = lively_job(tmp_path)
    model = prepare(job).start.model(print)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(TrainingFailed, match="2 workers are in one process group, but Accelerate sees 1"):
        DataParallel(job, model, "fp32", cuda=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_in_shared_memory_and_those_of_distributed_data_parallel_are_the_same(
    outcome: Outcome, variant: str
) -> None:
    memory, sockets = (outcome.ranks(f"{strategy}-{variant}")[0] for strategy in ("ddp", "sockets"))
    assert (memory.seen["together"], memory.seen["workers"]) == (True, 2)
    assert _different(memory.weights, sockets.weights) == []


@pytest.mark.parametrize("case", cases_of("fsdp"))
def test_fsdp_is_fsdp2_on_every_block_and_the_model(outcome: Outcome, case: str) -> None:
    for told in outcome.ranks(case):
        assert told.seen["sharded"] == ["", *(f"bert.encoder.layer.{number}" for number in range(3))]
        assert told.seen["workers"] == 2


@pytest.mark.parametrize("case", cases_of("fsdp"))
def test_each_rank_of_fsdp_holds_half_of_all_weights_and_moments(outcome: Outcome, case: str) -> None:
    ranks = outcome.ranks(case)
    whole = sum(tensor.numel() for tensor in ranks[0].weights.values())
    trainable = ranks[0].seen["trainable"]
    assert 0 < trainable <= whole
    # Cut by rows: of an odd number of them one rank has one more.
    assert [abs(told.seen["pieces"] - whole / 2) <= 16 for told in ranks] == [True, True]
    assert [abs(told.seen["held"] - trainable / 2) <= 16 for told in ranks] == [True, True]
    assert sum(told.seen["pieces"] for told in ranks) == whole
    assert sum(told.seen["held"] for told in ranks) == trainable
    assert [sorted(told.seen["released"]) == sorted(told.weights) for told in ranks] == [True, True]


@pytest.mark.parametrize("case", cases_of("zero0", "zero1", "zero2", "zero3"))
def test_zero_is_a_deepspeed_engine_at_its_stage(outcome: Outcome, case: str) -> None:
    stage = int(case.partition("-")[0].removeprefix("zero"))
    for told in outcome.ranks(case):
        assert told.seen["wrapped"] == "deepspeed.runtime.engine.DeepSpeedEngine"
        assert (told.seen["stage"], told.seen["workers"]) == (stage, 2)


@pytest.mark.parametrize("case", cases_of("zero1", "zero2", "zero3"))
def test_each_rank_of_zero_holds_half_of_the_optimizer_state(outcome: Outcome, case: str) -> None:
    told = [told.seen for told in outcome.ranks(case)]
    trainable = told[0]["trainable"]
    for seen in told:
        # DeepSpeed pads what it cuts: a group of parameters, or under ZeRO-3 each of them.
        assert trainable / 2 - 100 <= seen["held"] <= trainable / 2 + 100
    assert sum(seen["held"] for seen in told) >= trainable


@pytest.mark.parametrize("case", cases_of("sockets", "zero0"))
def test_without_sharding_each_rank_holds_the_whole_optimizer_state(outcome: Outcome, case: str) -> None:
    for told in outcome.ranks(case):
        assert told.seen["held"] == told.seen["trainable"] > 0


@pytest.mark.parametrize("case", cases_of("ddp"))
def test_workers_that_share_memory_hold_the_optimizer_state_of_the_parameters_that_they_step(
    outcome: Outcome, case: str
) -> None:
    first, second = (told.seen for told in outcome.ranks(case))
    assert first["held"] + second["held"] == first["trainable"]
    assert first["held"] > 0
    assert second["held"] > 0


@pytest.mark.parametrize("case", cases_of("zero3"))
def test_zero3_cuts_parameters_between_the_ranks(outcome: Outcome, case: str) -> None:
    for told in outcome.ranks(case):
        weights = told.weights
        whole = sum(tensor.numel() for tensor in weights.values())
        assert whole / 2 <= told.seen["pieces"] <= whole / 2 + len(weights)
        # The table of the words in use is below DeepSpeed's threshold, as all other weights of this model are.
        large = [] if case == "zero3-narrow" else ["bert.embeddings.word_embeddings.weight"]
        assert told.seen["released"] == large
