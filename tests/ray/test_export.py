"""From a checkpoint that holds what was trained to a folder that plain transformers loads, and that scores the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from banjoray.config.job import JobConfig
from banjoray.errors import TrainingFailed
from banjoray.training.checkpoints import Checkpoint, Store
from banjoray.training.export import export
from banjoray.training.interface import Callbacks
from banjoray.training.loop import fit
from banjoray.training.preflight import prepare
from banjoray.training.scoring import score_folder

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "layers": {"freeze": {"layers": 2}},
    "backbone": {"freeze": "backbone"},
    "bitfit": {"freeze": {"bitfit": True}},
    "lora": {"adapter": {"type": "lora"}},
    "dora": {"adapter": {"type": "dora", "merge": False}},
    "ia3": {"adapter": {"type": "ia3"}},
    "lora-top": {"adapter": {"type": "lora"}, "freeze": {"layers": 2}},
    "layerwise": {"train__layerwise_lr_decay": 0.7},
    "checkpointed": {"train__gradient_checkpointing": True},
    "weighted": {"train__label_smoothing": 0.1, "train__class_weights": "balanced"},
    "tokens": {"train__batching__mode": "tokens", "train__batching__max_tokens": 256},
}


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, lively_job: Callable[..., JobConfig]
) -> Callable[[str], tuple[JobConfig, Path, Checkpoint]]:
    """Trains a variant once; its job, the folder of its run, and its best checkpoint."""
    folder = tmp_path_factory.mktemp("export")
    done: dict[str, tuple[JobConfig, Path, Checkpoint]] = {}

    def train(variant: str) -> tuple[JobConfig, Path, Checkpoint]:
        if variant not in done:
            job = lively_job(folder, train__epochs=1, train__learning_rate=3e-3, **VARIANTS[variant])
            ready = prepare(job)
            run = folder / "runs" / variant
            result = fit(job, ready.rows, ready.task, ready.start, str(run), Callbacks())
            done[variant] = (job, run, result.checkpoint)
        return done[variant]

    return train


def exported(job: JobConfig, run: Path, checkpoint: Checkpoint) -> Path:
    ready = prepare(job)
    files = Store(str(run), pytest.fail).local(checkpoint)
    export(job, ready.start.model(), ready.start.tokenizer, checkpoint, files, run / "model")
    return run / "model"


Trained = Callable[[str], tuple[JobConfig, Path, Checkpoint]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_folder_of_a_checkpoint_scores_what_training_measured(trained: Trained, variant: str) -> None:
    job, run, checkpoint = trained(variant)
    found, _ = score_folder(exported(job, run, checkpoint), job, "validation")
    assert found.metrics == pytest.approx(checkpoint.metrics, abs=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_folder_has_the_names_and_shapes_of_the_base_architecture(trained: Trained, variant: str) -> None:
    from transformers import AutoModelForSequenceClassification

    job, run, checkpoint = trained(variant)
    folder = exported(job, run, checkpoint)
    weights = load_file(folder / "model.safetensors")
    plain = AutoModelForSequenceClassification.from_pretrained(job.model.base, num_labels=6).state_dict()
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in plain.items()}
    assert (folder / "adapter/adapter_model.safetensors").exists() == (variant == "dora")


@pytest.mark.parametrize("variant", ["layers", "backbone", "bitfit", "lora", "ia3", "lora-top"])
def test_a_checkpoint_holds_what_was_trained_and_nothing_that_was_not(trained: Trained, variant: str) -> None:
    job, run, checkpoint = trained(variant)
    files = Store(str(run), pytest.fail).local(checkpoint)
    model = prepare(job).start.model()
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(load_file(files / "weights.safetensors")) - {"banjoray.vocabulary_rows"} == learned
    moments = {name.partition(".")[2] for name in load_file(files / "optimizer.safetensors")}
    assert moments == learned


@pytest.mark.parametrize("variant", ["layers", "lora"])
def test_weights_that_were_frozen_are_those_of_the_base_in_the_folder_too(trained: Trained, variant: str) -> None:
    job, run, checkpoint = trained(variant)
    model = prepare(job).start.model()
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad and "base_layer" not in n}
    found = load_file(exported(job, run, checkpoint) / "model.safetensors")
    assert len(frozen) > 20
    assert [name for name, tensor in frozen.items() if not torch.equal(tensor, found[name])] == []


def test_a_base_model_that_has_changed_since_is_refused(trained: Trained, tmp_path: Path) -> None:
    job, run, checkpoint = trained("layers")
    base = Path(job.model.base) / "model.safetensors"
    before = load_file(base)
    moved = dict(before)
    moved["encoder.layer.0.output.dense.bias"] = before["encoder.layer.0.output.dense.bias"] + 1e-4
    try:
        save_file(moved, base, metadata={"format": "pt"})
        with pytest.raises(TrainingFailed, match=r"frozen weights of .* the base model was changed since"):
            exported(job, run, checkpoint)
    finally:
        save_file(before, base, metadata={"format": "pt"})
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_of_another_freezing_is_refused(trained: Trained) -> None:
    job, run, checkpoint = trained("layers")
    with pytest.raises(TrainingFailed, match="the checkpoint is of another model or freezing"):
        exported(job.with_values({"freeze": "none"}), run, checkpoint)


def test_layerwise_rates_fall_from_the_head_down(trained: Trained) -> None:
    from banjoray.training.optimizer import adamw, set_rate

    job, _, _ = trained("layerwise")
    model = prepare(job).start.model()
    optimizer = adamw(job, model)
    set_rate(optimizer, 1.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    expected = {
        "classifier.weight": 1,
        "bert.encoder.layer.2.output.dense.weight": 0.7,
        "bert.encoder.layer.0.output.dense.bias": 0.7**3,
        "bert.embeddings.word_embeddings.weight": 0.7**4,
    }
    assert {name: by_name[name] for name in expected} == pytest.approx(expected)


def test_manifest_of_a_checkpoint_says_what_it_is(trained: Trained) -> None:
    _, run, checkpoint = trained("full")
    manifest = json.loads((run / "checkpoints" / checkpoint.name / "checkpoint.json").read_text())
    assert set(manifest["files"]) == {"weights.safetensors", "optimizer.safetensors", "job.yaml"}
    assert 0.99 < manifest["position"]["decay"] < 1
