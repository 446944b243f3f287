"""Every job file and serve config that the project ships loads, and those that run offline pass `banjoray check`."""

import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from banjoray.config.job import load_job
from banjoray.config.section import validate
from banjoray.config.serve import ServeConfig
from banjoray.training.preflight import prepare
from banjoray.tuning.space import corner_jobs
from factories import sample_rows

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
SERVE_CONFIGS = sorted(path for path in (ROOT / "serve_configs").glob("*.yaml") if path.name != "kustomization.yaml")


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_job_file_loads_and_is_named_by_what_it_does(path: Path) -> None:
    job = load_job(path)
    assert (job.tune is not None) == path.name.startswith("tune_")
    assert "$schema=../docs/job.schema.json" in path.read_text(encoding="utf-8").splitlines()[0]
    assert len(list(corner_jobs(job))) > 1 if job.tune else True


@pytest.mark.parametrize("path", [path for path in JOBS if "quickstart" in path.name], ids=lambda path: path.name)
def test_offline_jobs_are_ready_to_run(path: Path, tmp_path: Path) -> None:
    ready = prepare(load_job(path, [f"storage={tmp_path}"]))
    assert len(ready.splits.train) == 600
    assert ready.warnings == ()


@pytest.mark.parametrize("path", SERVE_CONFIGS, ids=lambda path: path.name)
def test_every_serve_config_is_in_serves_own_schema_and_its_args_are_ours(path: Path) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    for application in config.applications:
        assert application.import_path == "banjoray.serving.app:build"
        assert validate(ServeConfig, application.args, path.name).model


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
    needed = [f"banjoray/data/samples/emotion/{split}.jsonl" for split in ("train", "validation", "test")]
    needed += ["banjoray/shipped/jobs/quickstart.yaml", "banjoray/shipped/serve_configs/quickstart.yaml"]
    assert [name for name in needed if name not in names] == []
    assert not [name for name in names if name.startswith(("platform/", "tests/"))]


def test_the_shipped_sample_is_balanced_and_repeats_nothing() -> None:
    texts = [row["text"].lower() for split in ("train", "validation", "test") for row in sample_rows(split)]
    assert len(texts) == len(set(texts)) == 720
    for split, each in (("train", 100), ("validation", 10), ("test", 10)):
        counted = Counter(row["label"] for row in sample_rows(split))
        assert counted == dict.fromkeys(("sadness", "joy", "love", "anger", "fear", "surprise"), each)
