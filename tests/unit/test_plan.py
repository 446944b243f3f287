"""A plan says what the run then takes: its steps, its batches, its checkpoints; and nothing is loaded for it."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml

from banjoray import cli
from banjoray.config.job import JobConfig
from banjoray.data.batches import batches_of, width_of
from banjoray.data.splits import Split
from banjoray.data.tokens import Tokens
from banjoray.errors import ModelError
from banjoray.training.dropout import FastDropout
from banjoray.training.interface import Callbacks, Moment, Rows
from banjoray.training.loop import fit
from banjoray.training.preflight import prepare
from banjoray.tuning.footprint import Memory, Shape, activations, copies_bytes
from banjoray.tuning.plan import Plan, padding, plan, work_of
from banjoray.tuning.space import at_once
from factories import DEPTH, make_job

pytestmark = pytest.mark.usefixtures("own_cache")

CHOICES: list[Any] = ["embeddings", {"layers": 2}, {"layers": DEPTH}, "backbone", "none"]
SPACE = {
    "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "freeze": {"choice": CHOICES},
}


def trained(job: JobConfig, run: Path) -> list[Moment]:
    """What a run of the job tells, in this process."""
    ready, moments = prepare(job), list[Moment]()
    fit(job, ready.rows, ready.task, ready.start, str(run), Callbacks(watch=moments.append))
    return moments


def of_lengths(*lengths: int) -> Rows:
    """Rows of those lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = Tokens({"input_ids": np.zeros(offsets[-1], np.int32)}, offsets, np.zeros(len(lengths), np.int64))
    return Rows(tokens, tokens, ("a", "b"), 0, Split("validation", datasets.Dataset.from_dict({}), {}))


def by_strategy(found: Plan) -> Mapping[str, Memory]:
    return {row.strategy: row for row in found.memory}


@pytest.mark.parametrize(
    ("changes", "coarse"),
    [
        ({}, False),
        ({"train__batching": {"mode": "tokens", "max_tokens": 300}}, False),
        ({"train__precision": "bf16"}, True),
        ({"train__precision": "bf16", "train__batching": {"mode": "tokens", "max_tokens": 300}}, False),
    ],
)
def test_steps_and_padding_are_those_of_the_run(tmp_path: Path, changes: dict[str, Any], coarse: bool) -> None:
    job = make_job(tmp_path, **changes)
    work = plan(job).work
    moments = trained(job, tmp_path / "run")
    assert (work.steps, work.epochs) == (moments[-1].step, 2)
    assert work.steps == moments[0].steps
    first = [moment for moment in moments if moment.epoch == 1]
    assert work.steps_per_epoch == len(first)
    ready = prepare(job)
    cells = tokens = 0
    for batch, moment in zip(batches_of(ready.rows.train.lengths, job.train, 0), first, strict=True):
        lengths = ready.rows.train.lengths[batch]
        width = width_of(lengths, coarse, int(ready.rows.train.lengths.max()))
        cells, tokens = cells + len(batch) * width, tokens + int(lengths.sum())
        assert moment.padding == pytest.approx(1 - lengths.sum() / (len(batch) * width))
    assert work.padding == pytest.approx(1 - tokens / cells)
    assert work.tokens_per_epoch == tokens


def test_padding_is_what_a_hand_counts() -> None:
    # 3 x 4 and 2 x 6 cells, of which 9 and 10 hold a token.
    batches = [np.array([0, 1, 2]), np.array([3, 4])]
    assert padding(np.array([4, 3, 2, 6, 4]), batches, [(3, 4), (2, 6)]) == pytest.approx(5 / 24)


def test_padding_and_microbatches_are_counted_as_workers_cut_them(shared_job: JobConfig) -> None:
    rows = of_lengths(8, 7, 2, 1)
    one = work_of(shared_job.with_values({"train.batch_size": 4}), rows)
    assert (one.steps_per_epoch, one.microbatch) == (1, (4, 8))
    assert one.padding == pytest.approx(14 / 32)
    # Each of two workers has a long row and a short one, each of two microbatches those of a kind.
    two = work_of(shared_job.with_values({"train.batch_size": 4, "scale.workers": 2}), rows)
    assert two.microbatch == (2, 8)
    assert two.padding == pytest.approx(12 / 30)
    halves = {"train.batch_size": 4, "train.gradient_accumulation_steps": 2}
    halved = work_of(shared_job.with_values(halves), rows)
    assert halved.microbatch == (2, 8)
    assert halved.padding == pytest.approx(2 / 20)


def test_rows_that_are_cut_are_counted(tmp_path: Path) -> None:
    work = plan(make_job(tmp_path, data__max_length=8)).work
    assert (work.train_rows, work.validation_rows, work.labels, work.longest_row) == (96, 30, 6, 8)
    assert work.rows_cut > 60


def test_memory_of_zero3_falls_with_workers_and_that_of_ddp_does_not(shared_job: JobConfig) -> None:
    plans = {n: by_strategy(plan(shared_job.with_values({"scale.workers": n}))) for n in (1, 2, 4)}

    def held(strategy: str, workers: int) -> float:
        row = plans[workers][strategy]
        return row.weights_gib + row.gradients_gib + row.optimizer_gib

    for strategy in ("zero3", "fsdp"):
        assert held(strategy, 4) == pytest.approx(held(strategy, 1) / 4)
    assert held("ddp", 4) == held("ddp", 1) == held("zero0", 4)
    assert held("zero3", 4) < held("zero2", 4) < held("zero1", 4) < held("ddp", 4)
    # Every worker has fewer rows.
    assert plans[4]["ddp"].activations_gib < plans[1]["ddp"].activations_gib
    assert [row.strategy for row in plans[2].values() if row.chosen] == ["ddp"]


def test_memory_is_sixteen_bytes_for_a_trained_weight_and_four_for_a_frozen_one(shared_job: JobConfig) -> None:
    found = plan(shared_job.with_values({"freeze": {"layers": 2}}))
    frozen = found.weights - found.trained
    row = by_strategy(found)["ddp"]
    held = row.weights_gib + row.gradients_gib + row.optimizer_gib
    assert held * 2**30 == pytest.approx(16 * found.trained + 4 * frozen)
    assert row.total_gib == pytest.approx(held + row.activations_gib)


def test_memory_on_gpus_has_deepspeeds_buffer_and_leaves_out_what_is_offloaded(shared_job: JobConfig) -> None:
    values = {"scale.gpus_per_worker": 1, "scale.strategy": "zero2", "train.precision": "tf32"}
    job = shared_job.with_values(values)
    row = by_strategy(plan(job))["zero2"]
    assert (row.chosen, row.buffers_gib * 2**30) == (True, 2e9)
    away = by_strategy(plan(job.with_values({"scale.offload": "cpu"})))
    assert (away["zero2"].optimizer_gib, away["ddp"].optimizer_gib > 0) == (0, True)


@pytest.mark.parametrize(
    ("changes", "blocks"), [({}, DEPTH), ({"freeze": {"layers": 2}}, 1), ({"freeze": "backbone"}, 0)]
)
def test_only_blocks_above_the_frozen_bottom_keep_activations(
    shared_job: JobConfig, changes: dict[str, Any], blocks: int
) -> None:
    found = plan(shared_job.with_values(changes))
    kept, (rows, tokens) = found.activations, found.work.microbatch
    # Two heads.
    assert kept.numbers == blocks * (17 + 2 * 2 * tokens / 32)
    assert kept.bytes == rows * tokens * 32 * kept.numbers * 4
    assert kept.bytes == pytest.approx(by_strategy(found)["ddp"].activations_gib * 2**30)


def test_gradient_checkpointing_keeps_the_inputs_of_blocks_and_one_block(shared_job: JobConfig) -> None:
    kept = plan(shared_job.with_values({"train.gradient_checkpointing": True})).activations
    assert kept.numbers == DEPTH + kept.numbers_per_block


def saved_bytes(model: torch.nn.Module, rows: int, tokens: int, half: bool) -> int:
    """What autograd keeps of a forward pass as the loop makes it, the weights left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.ones(rows, tokens, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with hooks, precision, FastDropout(np.random.SFC64(0)):
        model(input_ids=ids, attention_mask=mask)
    return sum(found.values())


@pytest.mark.parametrize("tokens", [24, 96])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_keep_what_autograd_keeps_within_a_quarter(shared_job: JobConfig, precision: str, tokens: int) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=128, intermediate_size=512, num_attention_heads=4)
    job = shared_job.with_values({"train.precision": precision})
    found, expected = [], []
    for config.num_hidden_layers in (1, 4):
        model = BertForSequenceClassification(config).train()
        shape = Shape(job, of_lengths(1), model, None, 0)
        found.append(saved_bytes(model, 8, tokens, precision == "bf16"))
        expected.append(activations(shape, (8, tokens)).bytes + copies_bytes(shape))
    assert expected[1] - expected[0] == pytest.approx(found[1] - found[0], rel=0.25)


def test_frozen_job_has_fewer_trained_weights_and_smaller_checkpoints(shared_job: JobConfig) -> None:
    plans = [plan(shared_job.with_values({"freeze": freeze})) for freeze in ("none", "embeddings", {"layers": 2})]
    for more, less in pairwise(plans):
        assert less.trained < more.trained
        assert less.disk.checkpoint_bytes < more.disk.checkpoint_bytes
    assert {found.weights for found in plans} == {plans[0].weights}
    adapted = plan(shared_job.with_values({"adapter": {"type": "lora"}}))
    assert adapted.trained < plans[2].trained
    assert adapted.weights > plans[0].weights


@pytest.mark.parametrize("changes", [{}, {"freeze": "embeddings"}, {"adapter": {"type": "lora", "r": 32}}])
def test_checkpoints_of_a_run_are_as_large_as_planned(
    tmp_path: Path, lively_job: Callable[..., JobConfig], changes: dict[str, Any]
) -> None:
    job = lively_job(tmp_path, **changes)
    disk = plan(job).disk
    trained(job, tmp_path / "run")
    folders = list((tmp_path / "run/checkpoints").glob("step-*"))
    assert len(folders) == job.train.keep_checkpoints
    for folder in folders:
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert disk.checkpoint_bytes == pytest.approx(size, rel=0.1)
    assert disk.run_bytes == (job.train.keep_checkpoints + 1) * disk.checkpoint_bytes


def test_disk_is_that_of_the_files_and_within_the_budget(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    disk = plan(job).disk
    entries = [path for path in (tmp_path / "runs/cache/tokens").rglob("*") if path.is_file()]
    assert disk.tokens_bytes == sum(path.stat().st_size for path in entries)
    assert disk.free_bytes
    # The least that a job of this size may have.
    bounded = job.with_values({"train.checkpoint_budget_gib": 0.01, "train.keep_checkpoints": 99})
    assert plan(bounded).disk.run_bytes == int(0.01 * 2**30) < 100 * disk.checkpoint_bytes


def test_prefix_decision_is_listed_for_every_freeze_of_a_space(shared_job: JobConfig) -> None:
    job = shared_job.with_values({"tune": {"space": SPACE, "trials": 6}, "cache.prefix": "always"})
    found = {str(one.freeze): one for one in plan(job).freezes}
    assert list(found) == [str(choice) for choice in CHOICES]
    assert [one.depth for one in found.values()] == [0, 2, DEPTH, DEPTH, None]
    assert [one.keep for one in found.values()] == [True, True, True, True, False]
    assert [one.chosen for one in found.values()] == [False, False, False, False, True]
    rows = prepare(job).rows
    whole = 32 * 4 * sum(int(part.lengths.sum()) for part in (rows.train, rows.validation))
    first = 32 * 4 * (len(rows.train) + len(rows.validation))
    assert [one.prefix_bytes for one in found.values()] == [whole, whole, first, first, 0]
    # Both freezes of all blocks read the same states.
    assert plan(job).disk.prefix_bytes == 2 * whole + first


def test_prefix_decision_gives_its_reason(shared_job: JobConfig) -> None:
    job = shared_job.with_values({"freeze": {"layers": 2}, "cache.prefix": "never"})
    (found,) = plan(job).freezes
    assert (found.keep, found.reason, found.depth, found.prefix_bytes) == (False, "cache.prefix is never", 2, 0)
    (found,) = plan(job.with_values({"cache.prefix": "auto", "train.epochs": 1})).freezes
    assert found.reason == "one pass over the rows reads nothing twice"


@pytest.mark.parametrize("expected", [{"layers": 2}, {"layers": DEPTH}])
def test_kept_states_take_the_bytes_that_are_planned(tmp_path: Path, expected: Any) -> None:
    job = make_job(tmp_path, freeze=expected, cache__prefix="always")
    (found,) = plan(job).freezes
    trained(job, tmp_path / "run")
    files = list((tmp_path / "runs/cache/prefix").glob("*/states.npy"))
    assert len(files) == 2
    assert found.prefix_bytes == pytest.approx(sum(path.stat().st_size for path in files), abs=2 * 128)


def test_study_has_waves_of_trials_and_the_checkpoints_of_all(
    shared_job: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    job = shared_job.with_values({"tune": {"space": SPACE, "trials": 6}})
    found = plan(job)
    assert found.study
    assert (found.study.trials, found.study.at_once, found.study.waves) == (6, 4, 2)
    assert found.study.disk_bytes == 2 * 6 * max(one.checkpoint_bytes for one in found.freezes)
    assert plan(job.with_values({"tune.disk_budget_gib": 0.001})).study == replace(
        found.study, disk_bytes=int(0.001 * 2**30)
    )
    assert plan(shared_job).study is None


@pytest.mark.parametrize(
    ("changes", "cpus", "gpus", "trials"),
    [
        ({}, 4, 0, 4),
        ({}, 64, 0, 6),
        ({"scale.cpus_per_worker": 2}, 4, 0, 2),
        ({"scale.workers": 2}, 4, 0, 2),
        ({"scale.workers": 8}, 4, 0, 1),
        ({"tune.concurrent": 3}, 4, 0, 3),
        ({"tune.concurrent": 9}, 4, 0, 4),
        ({"scale.gpus_per_worker": 1}, 64, 2, 2),
    ],
)
def test_as_many_trials_run_at_once_as_fit(
    shared_job: JobConfig, changes: dict[str, Any], cpus: int, gpus: int, trials: int
) -> None:
    job = shared_job.with_values({"tune": {"space": SPACE, "trials": 6}}).with_values(changes)
    assert at_once(job, cpus, gpus) == trials


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "electra", "gpt2", "albert"])
def test_every_family_has_a_plan(tmp_path: Path, bases: Mapping[str, Path], name: str) -> None:
    found = plan(make_job(tmp_path, model__base=str(bases[name])))
    assert found.activations.blocks == DEPTH
    assert found.trained <= found.weights


def test_no_weights_are_loaded(
    tmp_path: Path, lively_job: Callable[..., JobConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    def refuse(*given: object, **named: object) -> None:  # noqa: ARG001
        raise AssertionError("a plan loads weights")

    job = lively_job(tmp_path, tune={"space": SPACE})
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    with pytest.raises(AssertionError, match="loads weights"):
        prepare(job).start.model()
    assert plan(job).weights > 0


@pytest.mark.parametrize(
    ("key", "choice", "words"),
    [("freeze", {"layers": 99}, "3 blocks"), ("model.base", "no/such-model", "no/such-model")],
)
def test_choice_that_no_trial_could_have_is_refused(shared_job: JobConfig, key: str, choice: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        plan(shared_job.with_values({"tune": {"space": {key: {"choice": [choice]}}}}))


def asked(
    folder: Path, job: JobConfig, *arguments: str, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `banjoray plan`, in this process."""
    (folder / "job.yaml").write_text(yaml.safe_dump(job.to_json()), encoding="utf-8")
    patch.chdir(folder)
    patch.setattr(sys, "argv", ["banjoray", "plan", "job.yaml", *arguments])
    capture.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capture.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_json_is_one_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, tune={"space": SPACE})
    code, out, err = asked(tmp_path, job, "--json", patch=monkeypatch, capture=capsys)
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told == json.loads(json.dumps(plan(job).to_json() | {"disk": told["disk"]}))
    assert set(told) >= {"work", "weights", "trained", "memory", "activations", "freezes", "disk", "study"}
    assert all(row["total_gib"] > 0 for row in told["memory"])


def test_simple_job_is_told_in_thirty_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, freeze={"layers": 2})
    code, out, err = asked(tmp_path, job, "--set", "scale.workers=2", patch=monkeypatch, capture=capsys)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) <= 30
    for words in ("96 train, 30 validation, 6 labels", "6 per epoch, 12 in all", "one of 2 workers", "zero3", "ddp *"):
        assert words in out


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("freeze={layers: 99}", "freeze.layers: found 99"),
        ("tune={space: {freeze: {choice: [{layers: 99}]}}}", "freeze.layers: found 99"),
        ("tune={space: {train.seeds: {choice: [1]}}}", "train.seeds"),
        ("scale.offload=cpu", "scale.offload"),
        ("data.max_length=4000", "80 positions"),
    ],
)
def test_bad_job_exits_with_2_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, words: str
) -> None:
    job = make_job(tmp_path)
    code, out, err = asked(tmp_path, job, "--set", value, patch=monkeypatch, capture=capsys)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: ")
    assert words in err
