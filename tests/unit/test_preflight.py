"""What is found out before any worker starts, and what makes two runs the same run."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from banjoray.config.job import JobConfig
from banjoray.errors import AskedWrong, ConfigError, DataError, ModelError
from banjoray.training.preflight import prepare
from factories import make_job, sample_rows, write_rows

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_job_is_ready_without_writing_anything_but_tokens(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    ready = prepare(job)
    assert (len(ready.rows.train), len(ready.rows.validation), ready.warnings) == (96, 30, ())
    assert {path.name for path in Path(job.storage).iterdir()} == {"cache"}


def test_longer_texts_are_counted_in_a_warning(tmp_path: Path) -> None:
    ready = prepare(make_job(tmp_path, data__max_length=8))
    assert len(ready.warnings) == 2
    assert "of 96 texts" in ready.warnings[0]
    assert "data.max_length 8" in ready.warnings[0]


def test_a_base_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (Path(job.model.base) / name).unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        prepare(job)


@pytest.mark.parametrize("content", ["not json", '{"hidden_size": 3}'])
def test_a_config_that_cant_be_used_is_refused(content: str, tmp_path: Path) -> None:
    job = make_job(tmp_path)
    (Path(job.model.base) / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json that can't be used"):
        prepare(job)


@pytest.mark.parametrize("key", ["storage", "registry__root"])
def test_a_place_that_cant_be_made_is_refused_before_training(key: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (str(tmp_path / "file/below"), "nosuch://bucket"):
        changes: dict[str, Any] = {key: place}
        with pytest.raises(ConfigError, match=key.replace("__", ".")):
            prepare(make_job(tmp_path, **changes))


def test_relative_home_and_file_paths_are_anchored_alike(tmp_path: Path) -> None:
    job = make_job(tmp_path, storage="runs", registry__root="~/models")
    files = {"train": "data/train.jsonl", "validation": f"file://{tmp_path}/data/validation.jsonl", "test": None}
    fixed = job.with_values({"data.files": files, "model.base": "base"}).anchored(tmp_path)
    assert fixed.storage == str(tmp_path / "runs")
    assert fixed.registry.root == str(Path.home() / "models")
    assert fixed.model.base == str(tmp_path / "base")
    assert fixed.data.files is not None
    assert fixed.data.files.train == str(tmp_path / "data/train.jsonl")
    assert fixed.data.files.validation == str(tmp_path / "data/validation.jsonl")
    assert prepare(fixed).fingerprint == prepare(job.with_values({"data.files.test": None})).fingerprint


def test_urls_and_hub_names_are_not_anchored(tmp_path: Path) -> None:
    job = make_job(tmp_path, storage="s3://bucket/runs", model__base="org/model").anchored(tmp_path)
    assert (job.storage, job.model.base) == ("s3://bucket/runs", "org/model")


def test_the_hubs_endpoint_is_set_before_anything_imports_the_hub_library(tmp_path: Path) -> None:
    job = make_job(tmp_path, hub__endpoint="http://127.0.0.1:9")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.to_json()), encoding="utf-8")
    code = (
        "import sys; from banjoray.config.job import load_job; from banjoray.training.preflight import prepare\n"
        "prepare(load_job(sys.argv[1])); from huggingface_hub import constants; print(constants.ENDPOINT)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "job.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "http://127.0.0.1:9", done.stderr


def test_changed_rows_or_another_base_make_another_run_and_more_workers_do_not(tmp_path: Path) -> None:
    from banjoray.training.run import _identity

    def identity(job: JobConfig) -> str:
        return _identity(job, prepare(job))

    job = make_job(tmp_path)
    assert job.data.files is not None
    first = identity(job)
    assert identity(job.with_values({"scale.workers": 2, "train.keep_checkpoints": 5})) == first
    write_rows(Path(job.data.files.train), sample_rows("train")[:97])
    assert identity(job) != first
    write_rows(Path(job.data.files.train), sample_rows("train")[:96])
    assert identity(job) == first
    weights = Path(job.model.base) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert identity(job) != first


def test_rows_whose_labels_changed_since_are_scored_under_the_models_names_or_refused(tmp_path: Path) -> None:
    from banjoray.training.export import save_model
    from banjoray.training.scoring import score_folder

    job = make_job(tmp_path)
    ready = prepare(job)
    model = ready.start.model()
    folder = tmp_path / "trained"
    save_model(model, ready.start.tokenizer, job, folder)
    before, _ = score_folder(folder, job, "test")
    assert job.data.files is not None
    kept = [row for row in sample_rows("train") if row["label"] != "anger"]
    write_rows(Path(job.data.files.train), kept[:96])
    # Fewer labels in train: those that are left keep the model's order, and a row with the lost one is named.
    with pytest.raises(DataError, match=r"row \d+ holds label 'anger'"):
        score_folder(folder, job, "test")
    write_rows(Path(job.data.files.train), [*sample_rows("train")[:96], {"text": "what", "label": "aaa"}])
    with pytest.raises(AskedWrong, match=r"'aaa', which data\.labels does not list"):
        score_folder(folder, job, "test")
    write_rows(Path(job.data.files.train), sample_rows("train")[:96])
    assert score_folder(folder, job, "test")[0] == before
