"""Training from kept states is training from the words; no entry is ever read for something else."""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from banjoray.config.job import JobConfig
from banjoray.errors import ConfigError
from banjoray.models.readout import read_first_only
from banjoray.training import prefix_cache
from banjoray.training.checkpoints import Store
from banjoray.training.clock import Clock
from banjoray.training.interface import Callbacks, FitResult, Moment
from banjoray.training.loop import fit
from banjoray.training.prefix_cache import decide, kept_prefix
from banjoray.training.preflight import prepare
from factories import DEPTH, make_job

pytestmark = pytest.mark.usefixtures("own_cache")

CUT = ("bert", "distilbert", "roberta", "electra", "gpt2")
FREEZES: dict[str, Any] = {
    "embeddings": "embeddings",
    "two": {"layers": 2},
    "all": {"layers": DEPTH},
    "backbone": "backbone",
}
BOUND = 1e-5


def job_on(folder: Path, base: Path, **changes: Any) -> JobConfig:
    """A short run with dropout above the cut, from a base that other tests use too."""
    (folder / "base").exists() or shutil.copytree(base, folder / "base")
    return make_job(folder, **{"model__dropout": 0.1, "train__learning_rate": 5e-3} | changes)


def trained(job: JobConfig, run: Path) -> tuple[FitResult, list[Moment]]:
    ready, moments = prepare(job), list[Moment]()
    told = fit(job, ready.rows, ready.task, ready.start, str(run), Callbacks(watch=moments.append))
    return told, moments


def final(run: Path) -> dict[str, torch.Tensor]:
    """The weights and moments of a run's last checkpoint."""
    folder = Store(str(run), pytest.fail).all()[-1].name
    files = run / "checkpoints" / folder
    return load_file(files / "weights.safetensors") | load_file(files / "optimizer.safetensors")


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("frozen", FREEZES)
def test_training_from_kept_states_learns_every_weight_that_training_from_words_learns(
    tmp_path: Path, bases: Mapping[str, Path], name: str, frozen: str
) -> None:
    job = job_on(tmp_path, bases[name], freeze=FREEZES[frozen])
    _, online = trained(job.with_values({"cache.prefix": "never"}), tmp_path / "online")
    _, cached = trained(job.with_values({"cache.prefix": "always"}), tmp_path / "cached")
    assert ({moment.prefix for moment in online}, {moment.prefix for moment in cached}) == ({""}, {"computed"})
    expected, found = final(tmp_path / "online"), final(tmp_path / "cached")
    assert expected.keys() == found.keys()
    for weight, tensor in expected.items():
        assert float((found[weight] - tensor).abs().max()) <= BOUND, weight
    start = load_file(tmp_path / "online/checkpoints" / "step-00000006" / "weights.safetensors")
    assert any(float((expected[weight] - tensor).abs().max()) > 100 * BOUND for weight, tensor in start.items())
    scores = [[entry["loss"] for entry in Store(str(tmp_path / run), pytest.fail).all()[-1].position.history]
              for run in ("online", "cached")]  # fmt: skip
    assert scores[0] == pytest.approx(scores[1], abs=BOUND)


def entries(job: JobConfig) -> set[Path]:
    return {path.parent for path in prefix_cache.prefix_cache(job).glob("*/prefix.json")}


@pytest.fixture
def job(tmp_path: Path, bases: Mapping[str, Path]) -> JobConfig:
    return job_on(tmp_path, bases["bert"], freeze={"layers": 2}, cache__prefix="always")


def prefix_of(job: JobConfig, bf16: bool = False) -> Any:
    """What a run of this job starts from, and the note that it makes."""
    ready, notes = prepare(job), list[str]()
    model = ready.start.model().train()
    read_first_only(model)
    return kept_prefix(job, model, ready.rows, bf16, notes, Clock()), notes


def changed_row(job: JobConfig, tmp_path: Path) -> JobConfig:  # noqa: ARG001
    assert job.data.files
    file = Path(job.data.files.train)
    text = file.read_text(encoding="utf-8")
    place = text.index('"text": "') + 9
    file.write_text(text[:place] + ("x" if text[place] != "x" else "y") + text[place + 1 :], encoding="utf-8")
    return job


def changed_weight(job: JobConfig, tmp_path: Path) -> JobConfig:
    """One byte of one weight of a frozen block."""
    file = tmp_path / "base/model.safetensors"
    whole = bytearray(file.read_bytes())
    header = int.from_bytes(whole[:8], "little")
    names = json.loads(whole[8 : 8 + header])
    first = names["encoder.layer.1.output.dense.weight"]["data_offsets"][0]
    whole[8 + header + first] ^= 1
    file.write_bytes(bytes(whole))
    return job


def changed_tokenizer(job: JobConfig, tmp_path: Path) -> JobConfig:
    file = tmp_path / "base/tokenizer.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    words = told["model"]["vocab"]
    one, other = [word for word in words if word.isalpha()][10:12]
    words[one], words[other] = words[other], words[one]
    file.write_text(json.dumps(told), encoding="utf-8")
    return job


def changed_length(job: JobConfig, tmp_path: Path) -> JobConfig:  # noqa: ARG001
    return job.with_values({"data.max_length": 12})


@pytest.mark.parametrize("change", [changed_row, changed_weight, changed_tokenizer, changed_length])
def test_changed_byte_of_rows_model_tokenizer_or_length_never_reads_an_old_entry(
    tmp_path: Path, job: JobConfig, change: Callable[[JobConfig, Path], JobConfig]
) -> None:
    assert prefix_of(job)[0].origin == "computed"
    assert prefix_of(job)[0].origin == "read"
    before = entries(job)
    again, _ = prefix_of(change(job, tmp_path))
    assert again.origin == "computed"
    # A changed train row leaves the validation rows' states as they are.
    assert len(entries(job) - before) == (1 if change is changed_row else 2)


def test_weight_above_the_cut_and_the_number_of_labels_change_nothing_below_it(job: JobConfig) -> None:
    assert prefix_of(job)[0].origin == "computed"
    assert prefix_of(job.with_values({"train.seed": 5, "model.dropout": 0.3}))[0].origin == "read"


@pytest.mark.parametrize("harm", ["cut off", "other byte", "no manifest", "no states", "torn manifest"])
def test_torn_entry_is_made_again(job: JobConfig, harm: str) -> None:
    whole = prefix_of(job)[0].train.states.stream.copy()
    for entry in entries(job):
        states, manifest = entry / "states.npy", entry / "prefix.json"
        content = bytearray(states.read_bytes())
        match harm:
            case "cut off":
                states.write_bytes(content[:-40])
            case "other byte":
                content[len(content) // 2] ^= 1
                states.write_bytes(content)
            case "no manifest":
                manifest.unlink()
            case "no states":
                states.unlink()
            case "torn manifest":
                manifest.write_text(manifest.read_text()[:20])
    again, _ = prefix_of(job)
    assert again.origin == "computed"
    assert np.array_equal(again.train.states.stream, whole)
    assert prefix_of(job)[0].origin == "read"


def test_four_that_ask_at_the_same_moment_compute_it_once(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[str] = []
    fill = prefix_cache._Shelf._fill

    def counted(self: Any, entry: Path, *given: Any) -> None:
        filled.append(entry.name)
        fill(self, entry, *given)

    monkeypatch.setattr(prefix_cache._Shelf, "_fill", counted)
    ready = prepare(job)
    models = [ready.start.model() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda model: kept_prefix(job, model, ready.rows, False, [], Clock()), models))
    assert len(filled) == len(set(filled)) == 2
    streams = [one.train.states.stream for one in found if one]
    assert all(np.array_equal(stream, streams[0]) for stream in streams)
    assert len(streams) == 4


def test_deeper_cut_starts_from_the_states_of_a_shallower_one(job: JobConfig) -> None:
    ready = prepare(job)
    prefix_of(job.with_values({"freeze": {"layers": 1}}))
    model: Any = ready.start.model()
    blocks = model.base_model.encoder.layer
    calls: list[int] = []
    for number, block in enumerate(blocks):
        # Identity blocks are called too; what is computed inside a block is its attention.
        block.attention.register_forward_hook(lambda *_, number=number: calls.append(number))
    found = kept_prefix(job, model, ready.rows, False, [], Clock())
    assert found
    assert found.origin == "computed"
    # The two rows with which the cut is tried go through both blocks; the rows of the data through the upper one.
    assert calls.count(1) > calls.count(0)
    fresh = job.with_values({"storage": job.storage + "-fresh"})
    alone, _ = prefix_of(fresh)
    np.testing.assert_allclose(found.train.states.stream, alone.train.states.stream, atol=1e-6)


def test_states_of_a_run_in_bf16_take_half_and_those_that_are_scored_stay_fp32(job: JobConfig) -> None:
    found, _ = prefix_of(job, bf16=True)
    assert found.train.states.stream.dtype == np.int16
    assert found.validation.states.stream.dtype == np.float32
    exact, _ = prefix_of(job)
    rows = np.arange(8)
    cpu = torch.device("cpu")
    longest = int(np.diff(found.train.states.offsets)[rows].max())
    given, wanted = (prefix.train.states.padded(rows, longest + 3, cpu) for prefix in (found, exact))
    # What is padding is 0, also where no row reaches.
    assert not given[:, longest:].any()
    difference = given - wanted
    assert 0 < float(difference.abs().max()) < 0.1


def test_wholly_frozen_base_keeps_one_position_per_row(job: JobConfig) -> None:
    found, _ = prefix_of(job.with_values({"freeze": "backbone"}))
    assert found.train.states.stream.shape == (96, 32)


def test_entries_longest_unread_make_room_within_the_budget(job: JobConfig) -> None:
    prefix_of(job)
    sizes = {entry: (entry / "states.npy").stat().st_size for entry in entries(job)}
    budget = 1.5 * sum(sizes.values()) / 2**30
    tight = job.with_values({"cache.budget_gib": budget, "freeze": {"layers": 1}})
    assert prefix_of(tight)[0].origin == "computed"
    left = entries(job)
    assert sum((entry / "states.npy").stat().st_size for entry in left) <= budget * 2**30
    assert set(sizes) - left
    assert prefix_of(tight)[0].origin == "read"


def test_states_that_do_not_fit_are_an_error_if_they_must_and_a_run_without_them_if_not(job: JobConfig) -> None:
    small = {"cache.budget_gib": 1e-6}
    with pytest.raises(ConfigError, match=r"cache\.budget_gib: found 1e-06 with cache\.prefix always; the states"):
        prefix_of(job.with_values(small))
    found, _ = prefix_of(job.with_values(small | {"cache.prefix": "auto", "train.epochs": 50}))
    assert found is None
    assert entries(job) == set()


@pytest.mark.parametrize(
    ("changes", "keep", "reason"),
    [
        ({}, True, "2 passes over 0 MiB"),
        ({"train.epochs": 1}, False, "one pass over the rows reads nothing twice"),
        ({"freeze": "embeddings"}, False, "below the cut is nothing but a lookup of words"),
        ({"freeze": "embeddings", "cache.prefix": "always"}, True, "cache.prefix is always"),
        ({"cache.prefix": "never"}, False, "cache.prefix is never"),
        ({"cache.budget_gib": 1e-9}, False, "0.0 GiB are over cache.budget_gib 1e-09"),
        ({"train.epochs": 1, "tune": {"space": {"train.seed": {"choice": [1, 2]}}, "trials": 3}}, True, "3 passes"),
    ],
)
def test_states_are_kept_where_reading_them_is_faster(
    job: JobConfig, changes: dict[str, Any], keep: bool, reason: str
) -> None:
    asked = job.with_values({"cache.prefix": "auto"} | changes)
    # As many weights as a block of a usual model has: in one of 32 numbers, reading is no faster.
    model = prepare(asked).start.model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_cache, "CPU_FLOPS", 1e7)
        decision = decide(asked, model, np.full(96, 20), False, True)
    assert decision
    assert decision.keep is keep
    assert reason in decision.reason


def test_states_of_a_bottom_that_computes_fast_are_not_kept(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "CPU_FLOPS", 1e15)
    model = prepare(job).start.model()
    decision = decide(job.with_values({"cache.prefix": "auto"}), model, np.full(9, 20), False, True)
    assert decision
    assert not decision.keep
    assert "takes as long as computing them" in decision.reason


def test_run_that_goes_on_starts_from_the_states_too(job: JobConfig, tmp_path: Path) -> None:
    _, whole = trained(job, tmp_path / "whole")
    half = 7
    ready = prepare(job)
    steps: list[Moment] = []
    calls = Callbacks(watch=steps.append, should_stop=lambda: len(steps) == half)
    fit(job, ready.rows, ready.task, ready.start, str(tmp_path / "halves"), calls)
    _, rest = trained(job, tmp_path / "halves")
    assert {moment.prefix for moment in (*whole[1:], *steps, *rest)} == {"computed", "read"}
    left, right = final(tmp_path / "whole"), final(tmp_path / "halves")
    assert all(torch.equal(left[name], right[name]) for name in left)
