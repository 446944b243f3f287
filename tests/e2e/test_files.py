"""Every job file and serve config that the project ships loads, and those that run offline pass `banjoray check`."""

import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from banjoray.config.job import JobConfig, TaskName, load_job
from banjoray.config.section import validate
from banjoray.config.serve import ServeConfig
from banjoray.data.sources import SHIPPED
from banjoray.training.preflight import prepare
from banjoray.tuning.space import corner_jobs
from factories import sample_rows

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").rglob("*.yaml"))
TINY = ROOT / "jobs/tiny"
SERVE_CONFIGS = sorted(path for path in (ROOT / "serve_configs").glob("*.yaml") if path.name != "kustomization.yaml")
PLAYGROUND = ROOT / "platform/banjoray/serving/playground"


def named(path: Path) -> str:
    return path.relative_to(ROOT / "jobs").as_posix()


def ships(job: JobConfig) -> bool:
    """Whether the job's model and rows come with banjoray."""
    return all(str(found).startswith("banjoray:") for found in (job.model.base, job.data.source))


@pytest.mark.parametrize("path", JOBS, ids=named)
def test_every_job_file_loads_and_is_named_by_what_it_does(path: Path) -> None:
    job = load_job(path)
    assert (job.tune is not None) == path.name.startswith("tune_")
    schema = os.path.relpath(ROOT / "docs/job.schema.json", path.parent)
    assert f"$schema={schema}" in path.read_text(encoding="utf-8").splitlines()[0]
    assert len(list(corner_jobs(job))) > 1 if job.tune else True


@pytest.mark.parametrize("path", [path for path in JOBS if ships(load_job(path))], ids=named)
def test_offline_jobs_are_ready_to_run(path: Path, tmp_path: Path) -> None:
    job = load_job(path, [f"storage={tmp_path}"])
    ready = prepare(job)
    rows = SHIPPED / str(job.data.source).removeprefix("banjoray:") / "train.jsonl"
    assert len(ready.splits.train) == len(rows.read_text(encoding="utf-8").splitlines())
    assert ready.splits.test is not None
    assert ready.warnings == ()


def test_every_job_that_needs_the_hub_has_a_tiny_twin_and_no_twin_is_alone() -> None:
    originals = {path.name for path in JOBS if path.parent != TINY and not ships(load_job(path))}
    assert originals == {path.name for path in JOBS if path.parent == TINY}


@pytest.mark.parametrize("path", [path for path in JOBS if path.parent == TINY], ids=named)
def test_a_tiny_twin_does_what_its_original_does_offline_on_one_worker(path: Path) -> None:
    twin, original = load_job(path), load_job(ROOT / "jobs" / path.name)
    assert ships(twin)
    assert twin.hub.offline
    assert (twin.scale.most_workers, twin.scale.gpus_per_worker, twin.train.epochs) == (1, 0, 1)
    assert twin.registry.gate.at_least <= 0
    assert twin.registry.gate.at_most is None
    assert (twin.task, twin.train.metric, twin.embedding) == (original.task, original.train.metric, original.embedding)
    assert [column is None for column in twin.data.columns.model_dump().values()] == [
        column is None for column in original.data.columns.model_dump().values()
    ]
    assert (twin.adapter and twin.adapter.type) == (original.adapter and original.adapter.type)
    assert (twin.tune and set(twin.tune.space)) == (original.tune and set(original.tune.space))
    # Its models stand beside real ones in a registry, and no alias moves from one to the other.
    assert twin.model_name.startswith("tiny-")
    assert not original.model_name.startswith("tiny-")


def test_every_task_has_a_job_file() -> None:
    assert {load_job(path).task for path in JOBS if path.parent != TINY} == set(get_args(TaskName))


@pytest.mark.parametrize("path", SERVE_CONFIGS, ids=lambda path: path.name)
def test_every_serve_config_is_in_serves_own_schema_and_its_args_are_ours(path: Path) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    for application in config.applications:
        assert application.import_path == "banjoray.serving.app:build"
        assert validate(ServeConfig, application.args, path.name).references


def test_a_wheel_carries_what_the_quickstart_needs(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    needed = [f"banjoray/data/samples/{path.relative_to(SHIPPED).as_posix()}" for path in SHIPPED.rglob("*.jsonl")]
    assert len(needed) >= 21
    needed += ["banjoray/shipped/jobs/quickstart.yaml", "banjoray/shipped/serve_configs/quickstart.yaml"]
    page = [path for path in PLAYGROUND.iterdir() if path.is_file()]
    assert {path.suffix for path in page} == {".py", ".html", ".css", ".js", ".svg"}
    needed += [f"banjoray/serving/playground/{path.name}" for path in page]
    assert [name for name in needed if name not in names] == []
    assert not [name for name in names if name.startswith(("platform/", "tests/"))]


def test_the_shipped_sample_is_balanced_and_repeats_nothing() -> None:
    texts = [row["text"].lower() for split in ("train", "validation", "test") for row in sample_rows(split)]
    assert len(texts) == len(set(texts)) == 720
    for split, each in (("train", 100), ("validation", 10), ("test", 10)):
        counted = Counter(row["label"] for row in sample_rows(split))
        assert counted == dict.fromkeys(("sadness", "joy", "love", "anger", "fear", "surprise"), each)
