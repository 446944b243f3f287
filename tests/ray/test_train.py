"""`banjoray.train` and `score` on a real Ray: what comes out, what a kill costs, what a gate refuses."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

import banjoray
from banjoray.config.job import JobConfig
from banjoray.errors import ConfigError, GateRefused
from banjoray.registry import Registry
from banjoray.training import run as running
from banjoray.training.checkpoints import Store
from banjoray.training.interface import Moment
from banjoray.training.run import RunResult, _check_room, rescored, worker_environment
from banjoray.training.runs import claim_run
from factories import make_job, sample_rows, write_rows

pytestmark = pytest.mark.usefixtures("local_ray")

METRICS = {"accuracy", "f1_macro", "f1_micro", "f1_weighted", "matthews", "loss", "calibration_error"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def paired_job(folder: Path, lively_job: Callable[..., JobConfig]) -> JobConfig:
    """Two workers, so many validation rows that each evaluates a part, and paths that hold where Ray was started."""
    rows = write_rows(folder / "many.jsonl", sample_rows("train")[96:496])
    changes: dict[str, Any] = {"data__files__validation": os.path.relpath(rows), "train__learning_rate": 2e-3}
    changes["data__files__train"] = os.path.relpath(folder / "data/train.jsonl")
    return lively_job(folder, name="paired", scale__workers=2, train__epochs=3, **changes)


@pytest.fixture(scope="module")
def paired(paired_job: JobConfig) -> RunResult:
    return banjoray.train(paired_job)


def outputs(model_folder: Path, rows: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """(logits, label ids) of some rows, one at a time, with nothing of banjoray's: what any user of the folder gets."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with torch.inference_mode():
        logits = [
            model(**tokenizer(row["text"], truncation=True, max_length=40, return_tensors="pt")).logits[0].numpy()
            for row in rows
        ]
    return np.stack(logits), np.array([model.config.label2id[row["label"]] for row in rows])


def metrics_of(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Recorded metrics, by their definitions."""
    predicted = logits.argmax(axis=1)
    present = sorted(set(predicted) | set(targets))
    hits = np.array([np.sum((predicted == label) & (targets == label)) for label in present])
    counts = np.array([np.sum(targets == label) for label in present])
    f1 = 2 * hits / np.array([np.sum(predicted == label) + np.sum(targets == label) for label in present])
    shifted = logits.astype(np.float64)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    return {
        "accuracy": float(np.mean(predicted == targets)),
        "f1_macro": float(f1.mean()),
        "f1_weighted": float((f1 * counts).sum() / counts.sum()),
        "loss": float((log_sums - shifted[np.arange(len(targets)), targets]).mean()),
    }


def test_result_says_what_was_run_and_where_it_is(paired_job: JobConfig, paired: RunResult) -> None:
    told = json.loads(json.dumps(paired.to_json()))
    assert set(told) == {"run_id", "checkpoint", "version", "metrics", "steps", "seconds", "rows_per_s", "profile"}
    assert {"prepare", "collate", "forward", "backward", "optimizer", "evaluate"} <= set(told["profile"])
    assert set(told["metrics"]) == METRICS
    assert told["steps"] == 18
    assert told["seconds"] > 0
    assert told["rows_per_s"] > 0
    assert (Path(told["checkpoint"]) / "model.safetensors").is_file()
    stored = json.loads((Path(paired_job.storage) / told["run_id"] / "result.json").read_text())
    assert stored == told


def test_registered_folder_loads_with_transformers_and_gives_the_recorded_metrics(
    folder: Path, paired_job: JobConfig, paired: RunResult
) -> None:
    model, number = paired.version.split("@")
    registered = folder / "registry" / model / number
    logits, targets = outputs(registered, list(sample_rows("train")[96:496]))
    expected = metrics_of(logits, targets)
    assert {name: paired.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert dict(Registry(paired_job.registry.root).resolve(paired.version).metrics) == paired.metrics


def test_metrics_are_over_all_validation_rows_and_not_one_workers_share(paired: RunResult) -> None:
    logits, targets = outputs(Path(paired.checkpoint), list(sample_rows("train")[96:496]))
    # What a worker evaluates is a run of rows in the order of their length; no part of that size scores the same.
    for part in (slice(0, 200), slice(200, 400), slice(0, None, 2), slice(1, None, 2)):
        assert abs(metrics_of(logits[part], targets[part])["loss"] - paired.metrics["loss"]) > 1e-4


def test_lineage_leads_from_the_version_back_to_its_run_data_and_base(paired_job: JobConfig, paired: RunResult) -> None:
    lineage = Registry(paired_job.registry.root).resolve(paired.version).lineage
    assert (lineage["run"], lineage["trial"], lineage["base"]) == (paired.run_id, None, paired_job.model.base)
    assert lineage["job"] == paired.config.digest()
    assert all(lineage[key] for key in ("data", "base_digest", "code", "precision"))


def test_score_of_a_version_is_what_was_recorded(paired_job: JobConfig, paired: RunResult) -> None:
    found = banjoray.score(paired.version, "validation", paired_job.registry.root)
    assert found.score.metrics == pytest.approx(paired.metrics, abs=1e-6)
    assert sum(map(sum, found.score.confusion)) == 400
    assert found.same_data


def test_where_workers_may_be_elsewhere_one_of_them_scores_the_model(
    paired_job: JobConfig, paired: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def nobody(*_: Any) -> None:
        raise AssertionError("scored in this process")

    monkeypatch.setattr(running, "score_folder", nobody)
    with pytest.raises(AssertionError, match="in this process"):
        rescored(paired_job)(Path(paired.checkpoint))
    two = ray.nodes() * 2
    monkeypatch.setattr(ray, "nodes", lambda: two)
    assert rescored(paired_job)(Path(paired.checkpoint)).metrics == pytest.approx(paired.metrics, abs=1e-6)


def test_score_notices_that_the_data_has_changed(folder: Path, paired_job: JobConfig, paired: RunResult) -> None:
    file = folder / "data/test.jsonl"
    before = file.read_text()
    assert banjoray.score(paired.version, "test", paired_job.registry.root).same_data
    file.write_text(before.replace("joy", "sadness", 1))
    try:
        assert not banjoray.score(paired.version, "test", paired_job.registry.root).same_data
    finally:
        file.write_text(before)


def training_workers() -> list[Any]:
    """The processes of Ray Train's workers that this test process's Ray started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()) or "RayTrainWorker" in process.name():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture(scope="module")
def survived(folder: Path) -> tuple[RunResult, list[int], list[Moment]]:
    """A run one of whose two workers was killed in its third epoch or later; with whom, and what was seen."""
    killed: list[int] = []
    seen: list[Moment] = []

    def watch(moment: Moment) -> None:
        seen.append(moment)
        if moment.epoch >= 3 and not killed:
            worker = training_workers()[-1]
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)

    job = make_job(folder, name="survivor", scale__workers=2, train__epochs=30, train__batch_size=48)
    return banjoray.train(job, watch=watch), killed, seen


def test_run_whose_worker_is_killed_ends_with_all_its_steps_and_a_scored_version(
    folder: Path, survived: tuple[RunResult, list[int], list[Moment]]
) -> None:
    result, killed, _ = survived
    assert len(killed) == 1
    assert result.steps == 60
    version = Registry(str(folder / "registry")).resolve(result.version)
    assert set(version.metrics) == METRICS
    logits, targets = outputs(folder / "registry/survivor/1", list(sample_rows("validation")[:30]))
    expected = metrics_of(logits, targets)
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_run_whose_worker_is_killed_goes_on_from_a_checkpoint_and_does_each_epoch_once(
    folder: Path, survived: tuple[RunResult, list[int], list[Moment]]
) -> None:
    result, _, seen = survived
    newest = Store(str(folder / "runs" / result.run_id), pytest.fail).newest_whole()
    assert newest is not None
    assert newest.position.step == 60
    assert [entry["epoch"] for entry in newest.position.history] == list(range(1, 31))
    assert any("going on from step-" in moment.note for moment in seen)


@pytest.fixture(scope="module")
def gated(folder: Path) -> tuple[JobConfig, str]:
    """A job that its gate refused, and what it was told."""
    job = make_job(folder, name="gated", registry__gate__at_least=0.999, registry__gate__metric="accuracy")
    with pytest.raises(GateRefused) as refused:
        banjoray.train(job)
    return job, str(refused.value)


def _written(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}


def test_refused_by_its_gate_a_model_keeps_its_checkpoint_and_is_not_registered(
    folder: Path, gated: tuple[JobConfig, str]
) -> None:
    job, message = gated
    (run,) = Path(job.storage).glob("gated-*")
    assert "accuracy is 0." in message
    assert "needed at least 0.999" in message
    (checkpoint,) = [path for path in run.glob("model") if str(path) in message]
    assert (checkpoint / "model.safetensors").is_file()
    assert not (folder / "registry/gated").exists()


def test_lower_gate_registers_the_same_run_without_training_again_and_the_next_start_is_a_new_run(
    gated: tuple[JobConfig, str],
) -> None:
    job = gated[0].with_values({"registry.gate.at_least": 0.0})
    (run,) = Path(job.storage).glob("gated-*")
    before = _written(run)
    lines: list[str] = []
    result = banjoray.train(job, say=lines.append)
    assert lines[0].startswith(f"continuing run {run.name}:")
    assert (result.run_id, result.version, result.steps) == (run.name, "gated@1", 12)
    assert _written(run) == before
    stem = run.name.removesuffix("-1")
    with claim_run(job, stem) as again:
        assert (again.id, again.resumed) == (f"{stem}-2", False)


OTHER = """
import sys
from banjoray.config.job import load_job
from banjoray.training.runs import claim_run
with claim_run(load_job(sys.argv[1]), "same") as run:
    print(run.id, run.resumed, flush=True)
    sys.stdin.read()
"""


def test_second_process_with_the_same_job_gets_a_run_of_its_own_until_the_first_is_gone(tmp_path: Path) -> None:
    import yaml

    job = make_job(tmp_path)
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job.to_json()))
    with claim_run(job, "same") as mine, _other(file) as (other, told):
        assert (mine.id, told) == ("same-1", "same-2 False")
        other.kill()
        other.wait()
    # Neither finished: the next start goes on with the first, and a killed process has given its run back too.
    with claim_run(job, "same") as first, claim_run(job, "same") as second:
        assert (first.id, second.id) == ("same-1", "same-2")


@contextmanager
def _other(file: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A process that holds a run of the job in ``file``, and the line it printed."""
    command = [sys.executable, "-c", OTHER, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_more_workers_than_this_machine_has_room_for_are_refused(tmp_path: Path) -> None:
    _check_room(make_job(tmp_path, scale__workers=4))
    with pytest.raises(
        ConfigError, match=r"scale: 5 workers x 1 CPU need 5, this machine has 4\. Lower scale\.workers"
    ):
        _check_room(make_job(tmp_path, scale__workers=5))
    with pytest.raises(ConfigError, match=r"scale: 3 workers x 2 CPU need 6"):
        _check_room(make_job(tmp_path, scale__workers=3, scale__cpus_per_worker=2))
    with pytest.raises(ConfigError, match=r"scale: 1 workers x 1 GPU need 1, this machine has 0"):
        _check_room(make_job(tmp_path, scale__gpus_per_worker=1))


def test_hub_mirror_is_set_in_a_worker_before_anything_reads_it(tmp_path: Path) -> None:
    import ray

    job = make_job(tmp_path, hub__endpoint="https://mirror.example", hub__offline=True)

    def look() -> tuple[str, bool, str | None]:
        import huggingface_hub.constants

        return (
            huggingface_hub.constants.ENDPOINT,
            huggingface_hub.constants.HF_HUB_OFFLINE,
            os.environ.get("DS_ACCELERATOR"),
        )

    remote = ray.remote(num_cpus=0)(look).options(runtime_env={"env_vars": worker_environment(job)})
    assert ray.get(remote.remote()) == ("https://mirror.example", True, "cpu")


def test_job_that_cannot_start_leaves_nothing_behind(tmp_path: Path) -> None:
    job = make_job(tmp_path, data__max_length=81)
    with pytest.raises(ConfigError, match=r"data\.max_length: found 81; .* has 80 positions"):
        banjoray.train(job)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "registry").exists()
