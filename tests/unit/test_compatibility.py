"""What goes with what: every refusal says what to change, every allowed cell is tried by a test, and the docs agree."""

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from banjoray.config.job import JobConfig
from banjoray.config.section import known_keys, validate
from banjoray.errors import ConfigError
from banjoray.training.compatibility import (
    AXES,
    JOB_RULES,
    KEYS,
    RULES,
    Cell,
    cell_of,
    cells,
    check,
    check_budget,
    markdown,
    refusals,
)
from banjoray.training.preflight import prepare
from banjoray.training.strategies import COMPILED_FROM, compiles
from cells import Told, case_of
from factories import make_job

ROOT = Path(__file__).parents[2]
REFUSED = [cell for cell in cells() if refusals(cell)]
# A key and the value to set it to.
ADVICE = re.compile(r"([a-z_.]+)=([a-z0-9_.]+)")
BREACHES: list[tuple[dict[str, Any], str]] = [
    ({"scale.offload": "cpu"}, "scale.offload: found cpu with scale.strategy ddp; "),
    ({"scale.offload": "cpu", "scale.strategy": "fsdp"}, "scale.offload: found cpu with scale.strategy fsdp; "),
    ({"scale.offload": "cpu", "scale.strategy": "zero0"}, "scale.offload: found cpu with scale.strategy zero0; "),
    (
        {
            "scale.offload": "nvme",
            "scale.nvme_path": "/d",
            "scale.strategy": "zero2",
            "scale.gpus_per_worker": 1,
        },
        "scale.offload: found nvme with scale.strategy zero2, ",
    ),
    (
        {"train.precision": "fp16", "scale.strategy": "zero2"},
        "train.precision: found fp16 with scale.strategy zero2; ",
    ),
    ({"train.precision": "fp16", "scale.strategy": "fsdp"}, "train.precision: found fp16 with scale.strategy fsdp; "),
    ({"train.precision": "tf32"}, "train.precision: found tf32 with scale.gpus_per_worker 0; "),
    ({"adapter": {"type": "dora"}, "freeze": "backbone"}, "freeze: found backbone with adapter.type dora; "),
    ({"adapter": {}, "freeze": {"patterns": ["*"]}}, "freeze: found patterns with adapter.type lora; "),
    ({"adapter": {"type": "ia3"}, "freeze": {"bitfit": True}}, "freeze: found bitfit with adapter.type ia3; "),
    (
        {"scale.offload": "nvme", "scale.strategy": "zero3", "scale.gpus_per_worker": 1},
        "scale.nvme_path: found none with scale.offload nvme; ",
    ),
    ({"scale.nvme_path": "/disk"}, "scale.nvme_path: found /disk with scale.offload none, "),
    (
        {"train.max_skipped_steps": 3, "scale.strategy": "zero0"},
        "train.max_skipped_steps: found 3 with scale.strategy zero0, ",
    ),
    (
        {"train.torch_compile": "on", "scale.strategy": "fsdp"},
        "train.torch_compile: found on with scale.strategy fsdp, ",
    ),
    ({"task": "fill-mask", "cache.prefix": "always"}, "cache.prefix: found always with task fill-mask, which "),
]
ALLOWED: list[dict[str, Any]] = [
    {},
    {"scale.offload": "cpu", "scale.strategy": "zero1"},
    {
        "scale.offload": "nvme",
        "scale.strategy": "zero3",
        "scale.gpus_per_worker": 1,
        "scale.nvme_path": "/disk",
    },
    {"train.precision": "fp16"},
    {"train.precision": "tf32", "scale.gpus_per_worker": 1},
    {"adapter": {"type": "dora"}, "freeze": {"layers": 2}, "scale.strategy": "zero3"},
    {"train.max_skipped_steps": 3, "scale.strategy": "zero3"},
    {"train.torch_compile": "on", "train.gradient_checkpointing": True},
    {"train.torch_compile": "auto", "scale.strategy": "zero2"},
]


def job_with(changes: Mapping[str, Any]) -> JobConfig:
    tree = {"name": "tiny", "task": "text-classification", "data": {"files": {"train": "nowhere.csv"}}}
    return validate(JobConfig, tree, "job.yaml").with_values(changes)


def complaints(changes: Mapping[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(job_with(changes))
    return str(caught.value).splitlines()


def advised(cell: Cell, line: str) -> Cell:
    """The cell after the first advice of a refusal is followed."""
    advice = ADVICE.search(line.partition("; set ")[2])
    assert advice, line
    (axis,) = [axis for axis, key in KEYS.items() if key == advice[1]]
    value = {"0": "cpu", "1": "gpu"}[advice[2]] if axis == "device" else advice[2]
    assert value in AXES[axis], line
    return replace(cell, **{axis: value})


def parametrized(file: str) -> set[str]:
    """The cells that a test file tries, by the names of its tests."""
    spec = importlib.util.spec_from_file_location(f"looked_at_{Path(file).stem}", ROOT / "tests" / file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    marks = module.test_an_allowed_cell_trains_what_it_should_and_as_ddp_does.pytestmark
    (names,) = [set(mark.args[1]) for mark in marks if mark.name == "parametrize"]
    return names


def test_there_is_a_cell_for_every_combination() -> None:
    everything = list(cells())
    assert len(everything) == len(set(everything)) == math.prod(len(values) for values in AXES.values())
    assert AXES["freeze"] == ("none", "embeddings", "backbone", "layers", "patterns", "bitfit")
    assert AXES["precision"] == ("fp32", "tf32", "bf16", "fp16")
    assert list(AXES) == list(KEYS) == list(Cell.__dataclass_fields__)


def test_every_refusal_starts_with_a_key_and_following_its_advice_answers_it() -> None:
    keys = set(known_keys(JobConfig))
    for cell in REFUSED:
        for line in refusals(cell):
            key, found, _ = line.partition(": found ")
            assert (key in keys, found) == (True, ": found "), line
            assert line not in refusals(advised(cell, line)), line


def test_following_one_advice_after_the_other_ends_at_an_allowed_cell() -> None:
    for refused in REFUSED:
        cell = refused
        for _ in RULES:
            if lines := refusals(cell):
                cell = advised(cell, lines[0])
        assert refusals(cell) == [], refused


def test_a_cell_is_allowed_if_each_pair_of_its_values_is() -> None:
    def pairs(cell: Cell) -> set[tuple[tuple[str, str], ...]]:
        return set(combinations(vars(cell).items(), 2))

    allowed = set().union(*(pairs(cell) for cell in cells() if not refusals(cell)))
    assert [cell for cell in REFUSED if pairs(cell) <= allowed] == []


@pytest.mark.parametrize(("changes", "start"), BREACHES, ids=[start for _, start in BREACHES])
def test_a_job_that_breaks_a_rule_gets_its_one_line(changes: dict[str, Any], start: str) -> None:
    line, *more = complaints(changes)
    assert line.startswith(start)
    assert "; set " in line
    assert more == []


def test_every_rule_is_broken_by_one_of_these_jobs() -> None:
    jobs = [job_with(changes) for changes, _ in BREACHES]
    device = {"scale.offload": "nvme", "scale.nvme_path": "/d", "scale.strategy": "zero3"}
    jobs.append(job_with(device))
    assert [rule for rule in RULES if not any(rule.refuses(cell_of(job)) for job in jobs)] == []
    assert [rule for rule in JOB_RULES if not any(rule.refuses(job) for job in jobs)] == []


@pytest.mark.parametrize("changes", ALLOWED, ids=repr)
def test_each_rule_lets_its_border_case_pass(changes: dict[str, Any]) -> None:
    check(job_with(changes))


def test_all_broken_rules_are_listed_one_a_line() -> None:
    lines = complaints({"train.precision": "tf32", "adapter": {}, "freeze": "embeddings", "scale.nvme_path": "/disk"})
    assert [line.partition(":")[0] for line in lines] == ["train.precision", "freeze", "scale.nvme_path"]


def test_auto_is_judged_when_it_is_known_what_it_came_to() -> None:
    job = job_with({"scale.strategy": "zero2", "scale.gpus_per_worker": 1})
    check(job)
    check(job, "bf16")
    with pytest.raises(ConfigError, match=r"train\.precision: found fp16 with scale\.strategy zero2"):
        check(job, "fp16")


@pytest.mark.parametrize("freeze", AXES["freeze"])
def test_the_cell_of_a_job_has_the_jobs_values(freeze: str) -> None:
    values: dict[str, Any] = {"layers": {"layers": 1}, "patterns": {"patterns": ["a"]}, "bitfit": {"bitfit": True}}
    job = job_with({"freeze": values.get(freeze, freeze), "scale.strategy": "fsdp", "train.precision": "bf16"})
    assert cell_of(job) == Cell("fsdp", freeze, "none", "bf16", "none", "cpu")
    other = job.with_values({"adapter": {"type": "ia3"}, "scale.gpus_per_worker": 1, "scale.offload": "cpu"})
    assert cell_of(other) == Cell("fsdp", freeze, "ia3", "bf16", "cpu", "gpu")


def test_a_job_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    job = job_with({"train.precision": "tf32", "storage": str(tmp_path / "runs"), "model.base": "no/such"})
    with pytest.raises(ConfigError, match=r"^train\.precision: found tf32"):
        prepare(job)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("file", "device"), [("ray/test_compatibility.py", "cpu"), ("gpu/test_gpu.py", "gpu")])
def test_every_allowed_cell_is_tried_by_a_test(file: str, device: str) -> None:
    allowed = [case_of(cell).name for cell in cells() if cell.device == device and not refusals(cell)]
    assert len(allowed) > 200
    assert parametrized(file) == set(allowed)
    assert len(set(allowed)) == len(allowed)


FINE = Told(
    loss=1.5,
    trained=["head.weight"],
    saved=["head.weight"],
    moments=["exp_avg.head.weight", "exp_avg_sq.head.weight"],
    agreed=True,
)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({}, None),
        ({"failure": "Traceback"}, "Traceback"),
        ({"loss": math.nan}, "the loss is nan"),
        ({"still": ["head.weight"]}, "did not move"),
        ({"saved": ["head.weight", "base.weight"]}, "the checkpoint holds"),
        ({"moments": []}, "it holds the moments"),
        ({"agreed": False}, "workers hold different weights"),
        ({"distance": 0.5}, "50.0% off ddp-none-none-fp32-none"),
        ({"distance": math.nan}, "off ddp-none-none-fp32-none"),
        ({"skipped": 1}, "1 steps were skipped"),
    ],
    ids=repr,
)
def test_what_went_wrong_in_a_cell_is_seen(wrong: dict[str, Any], complaint: str | None) -> None:
    found = replace(FINE, **wrong).complaints(case_of(Cell("zero3", "none", "none", "fp32", "none", "cpu")))
    assert [complaint is not None and complaint in line for line in found] == ([] if complaint is None else [True])


def test_the_docs_are_what_the_rules_say() -> None:
    assert (ROOT / "docs/compatibility.md").read_text(encoding="utf-8") == markdown()


def test_a_budget_has_to_hold_three_checkpoints() -> None:
    # 100 M weights and their two moments, in fp32.
    size = 3 * 4 * 100_000_000
    check_budget(job_with({}), 100_000_000)
    check_budget(job_with({"train.checkpoint_budget_gib": 3 * size / 2**30 + 0.01}), 100_000_000)
    with pytest.raises(ConfigError) as caught:
        check_budget(job_with({"train.checkpoint_budget_gib": 3}), 100_000_000)
    line = str(caught.value)
    assert line.startswith("train.checkpoint_budget_gib: found 3, needed at least 3.36: ")
    advice = ADVICE.search(line)
    assert advice
    check_budget(job_with({advice[1]: float(advice[2].rstrip("."))}), 100_000_000)


@pytest.mark.usefixtures("own_cache")
def test_a_budget_is_asked_for_the_words_in_use_and_for_what_is_trained_alone(tmp_path: Path) -> None:
    job = make_job(tmp_path, train__checkpoint_budget_gib=1e-9)

    def asked(**changes: Any) -> int:
        with pytest.raises(ConfigError, match=r"^train\.checkpoint_budget_gib: ") as caught:
            prepare(job.with_values({key.replace("__", "."): value for key, value in changes.items()}))
        found = re.search(r"with ([\d,]+) trained weights", str(caught.value))
        assert found
        return int(found[1].replace(",", ""))

    whole = prepare(make_job(tmp_path, train__checkpoint_budget_gib=1.0)).trainable
    assert asked(adapter={"type": "ia3"}) < asked() < whole


@pytest.mark.parametrize(
    ("asked", "gpus", "strategy", "steps", "compiled"),
    [
        ("auto", 1, "ddp", COMPILED_FROM, True),
        ("auto", 1, "ddp", COMPILED_FROM - 1, False),
        ("auto", 1, "zero2", COMPILED_FROM, False),
        ("auto", 0, "ddp", COMPILED_FROM, False),
        ("on", 0, "ddp", 1, True),
        ("off", 1, "ddp", COMPILED_FROM, False),
    ],
)
def test_auto_compiles_long_runs_on_gpus_alone(
    tmp_path: Path, asked: str, gpus: int, strategy: str, steps: int, compiled: bool
) -> None:
    job = make_job(tmp_path, train__torch_compile=asked, scale__gpus_per_worker=gpus, scale__strategy=strategy)
    assert compiles(job, steps) == compiled
