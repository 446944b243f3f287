"""Where a base model comes from, what the job changes in it, and what is refused before anything is loaded."""

import importlib.machinery
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from banjoray.config.job import HubConfig, JobConfig, ModelConfig
from banjoray.errors import ConfigError, ModelError
from banjoray.models.loading import (
    Base,
    base_config,
    find_base,
    labels_of,
    load_for_training,
    load_tokenizer,
    load_trained,
    sketch,
    use_hub,
    weights_digest,
)
from banjoray.tasks.text_classification import TextClassification
from banjoray.training.preflight import prepare
from factories import ARCHITECTURES, make_job, sample_rows, tiny_model, tiny_tokenizer, write_rows

pytestmark = pytest.mark.usefixtures("own_cache", "environment")
TASK = TextClassification()
LABELS = ("anger", "fear", "joy")
HERE = HubConfig(offline=True)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The process's environment and offline mode, put back after a test that changes them."""
    import huggingface_hub.constants

    copy = dict(os.environ)
    monkeypatch.setattr(os, "environ", copy)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return copy


def loaded(job: JobConfig, base: Path, seed: int = 0, **model: Any) -> Any:
    """The model that a job trains from ``base``; ``model`` are other keys of its section."""
    job = job.with_values({"model": {"base": str(base)} | model})
    found = find_base(job.model, HERE)
    return load_for_training(found, base_config(found, job, LABELS, 0), TASK, seed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_starts_from_the_bases_weights_in_fp32_with_a_seeded_head(
    shared_job: JobConfig, bases: Mapping[str, Path], architecture: str
) -> None:
    first, again, other = (loaded(shared_job, bases[architecture], seed=seed) for seed in (1, 1, 2))
    saved = load_file(bases[architecture] / "model.safetensors")
    prefix = f"{first.base_model_prefix}."
    for name, tensor in first.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64)
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
        if name.startswith(prefix):
            torch.testing.assert_close(tensor, saved[name.removeprefix(prefix)], rtol=0, atol=0)
    head = [name for name, _ in first.named_parameters() if not name.startswith(prefix) and name.endswith("weight")]
    assert head
    assert not any(torch.equal(first.state_dict()[name], other.state_dict()[name]) for name in head)
    assert labels_of(first) == LABELS


def passes(model: Any) -> list[torch.Tensor]:
    inputs = {"input_ids": torch.arange(4, 16)[None], "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
    torch.manual_seed(0)
    return [model.train()(**inputs).logits for _ in range(2)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_replaces_every_probability(
    shared_job: JobConfig, bases: Mapping[str, Path], architecture: str
) -> None:
    model = loaded(shared_job, bases[architecture], dropout=0.375)
    probabilities = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert set(probabilities) == {0.375}
    one, two = passes(loaded(shared_job, bases[architecture], dropout=0.0))
    assert torch.equal(one, two)
    one, two = passes(model)
    assert not torch.equal(one, two)


def test_without_dropout_the_bases_own_stays(shared_job: JobConfig, bases: Mapping[str, Path]) -> None:
    model = loaded(shared_job, bases["distilbert"], dropout=None)
    assert (model.config.dropout, model.config.seq_classif_dropout) == (0.1, 0.2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_more_tokens_than_positions_are_refused_and_as_many_fit(
    shared_job: JobConfig, bases: Mapping[str, Path], architecture: str
) -> None:
    limit = json.loads((bases[architecture] / "config.json").read_text()).get("max_position_embeddings", 80)
    limit -= architecture == "roberta"
    job = shared_job.with_values({"model.base": str(bases[architecture]), "data.max_length": limit})
    model = prepare(job).start.model()
    assert model(input_ids=torch.full((1, limit), 5)).logits.shape == (1, 6)
    with pytest.raises(ConfigError) as caught:
        prepare(job.with_values({"data.max_length": limit + 1}))
    expected = f"data.max_length: found {limit + 1}; {bases[architecture]} has {limit} positions"
    assert str(caught.value) == expected


def test_preflight_counts_the_rows_that_are_cut(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert prepare(job).warnings == ()
    rows = [*sample_rows("train")[:94], {"text": "very " * 60 + "happy", "label": "joy"}]
    write_rows(tmp_path / "data/train.jsonl", rows)
    assert prepare(job).warnings == ("train: 1 of 95 texts (1.1%) are longer than data.max_length 40 and are cut",)


def test_gpt2_gets_a_padding_token_and_reads_a_padded_batch(shared_job: JobConfig, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="[SEP]", unk_token="[UNK]"
    )
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=80)
    config.eos_token_id = config.bos_token_id = 3
    folder = tmp_path / "gpt2"
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    plain.save_pretrained(folder)

    found = load_tokenizer(Base(str(folder), "", {}))
    assert (found.pad_token, found.pad_token_id) == ("[SEP]", 3)
    ready = prepare(shared_job.with_values({"model.base": str(folder)}))
    assert ready.rows.pad_id == 3
    model: Any = ready.start.model().eval()
    assert model.config.pad_token_id == 3
    batch = found(["i feel happy", "i feel so very happy today"], padding=True, return_tensors="pt")
    alone = found(["i feel happy"], return_tensors="pt")
    torch.testing.assert_close(model(**batch).logits[:1], model(**alone).logits)


def test_the_sketch_has_the_names_and_shapes_of_the_model_and_no_memory(
    shared_job: JobConfig, bases: Mapping[str, Path]
) -> None:
    model = loaded(shared_job, bases["bert"])
    drawn = sketch(model.config, TASK)
    assert {name: tensor.shape for name, tensor in drawn.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert {parameter.device.type for parameter in drawn.parameters()} == {"meta"}


def trained(job: JobConfig, base: Path, folder: Path) -> Path:
    loaded(job, base).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_trained_folder_comes_back_in_eval_mode_with_its_labels(
    shared_job: JobConfig, tmp_path: Path, bases: Mapping[str, Path]
) -> None:
    model, tokenizer = load_trained(trained(shared_job, bases["bert"], tmp_path / "trained"), TASK)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert labels_of(model) == LABELS
    assert tokenizer("i feel")["input_ids"] == tiny_tokenizer()("i feel")["input_ids"]


def test_a_folder_with_pickled_weights_only_is_not_loaded(
    shared_job: JobConfig, tmp_path: Path, bases: Mapping[str, Path]
) -> None:
    folder = trained(shared_job, bases["bert"], tmp_path / "trained")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_trained(folder, TASK)


def test_the_digest_of_a_folder_changes_with_weights_and_config_only(tmp_path: Path, bases: Mapping[str, Path]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bases["bert"], folder)
    first = weights_digest(folder)
    (folder / "notes.txt").write_text("a note")
    assert weights_digest(folder) == first == find_base(ModelConfig(base=str(folder)), HERE).digest
    for name in ("config.json", "model.safetensors"):
        before = weights_digest(folder)
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        assert weights_digest(folder) != before


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^model\.base: '.*' has no config\.json; needed a Hugging Face model folder"):
        find_base(ModelConfig(base=str(tmp_path)), HERE)


def test_a_hub_model_that_is_not_here_is_refused_offline_without_the_network(asked_hosts: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        find_base(ModelConfig(base="nobody/nothing"), HERE)
    message = str(caught.value)
    assert message.startswith("model.base: 'nobody/nothing' is no folder here and can't be had from the hub (")
    assert message.endswith("; hub.offline is true")
    assert "\n" not in message
    assert asked_hosts == []


def package(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    """Let the package that carries MiniLM be in ``folder``, or nowhere."""
    spec = importlib.machinery.ModuleSpec("minilm", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if folder is None else spec)


def test_the_packaged_minilm_has_the_published_weights() -> None:
    found = find_base(ModelConfig(base="banjoray:minilm"), HERE)
    config = transformers.AutoConfig.from_pretrained(found.path)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("bert", 6, 384)


def test_minilm_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(tmp_path / "model")
    package(monkeypatch, tmp_path)
    with pytest.raises(ModelError) as caught:
        find_base(ModelConfig(base="banjoray:minilm"), HERE)
    assert "not the published 53aa51172d14...; they are not loaded. Reinstall" in str(caught.value)


def test_minilm_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    package(monkeypatch, None)
    with pytest.raises(ModelError, match=r"needs the quickstart extra: pip install 'banjoray\[quickstart\]'$"):
        find_base(ModelConfig(base="banjoray:minilm"), HERE)


def test_another_name_that_banjoray_would_have_to_know_is_refused() -> None:
    with pytest.raises(ModelError, match=r"there is no 'banjoray:bert'; banjoray knows banjoray:minilm, .*:tiny-t5$"):
        find_base(ModelConfig(base="banjoray:bert"), HERE)


def test_the_hub_section_becomes_the_environment_and_names_the_token(environment: dict[str, str]) -> None:
    import huggingface_hub.constants

    endpoint = huggingface_hub.constants.ENDPOINT
    environment["MY_TOKEN"] = "secret"
    assert use_hub(HubConfig(endpoint=f"{endpoint}/", offline=True, token_env="MY_TOKEN")) == "secret"
    assert (environment["HF_ENDPOINT"], environment["HF_HUB_OFFLINE"]) == (f"{endpoint}/", "1")
    assert huggingface_hub.constants.is_offline_mode()
    assert use_hub(HubConfig(token_env="NO_SUCH_TOKEN")) is None


def test_an_endpoint_that_comes_too_late_is_refused() -> None:
    import huggingface_hub.constants

    with pytest.raises(ConfigError) as caught:
        use_hub(HubConfig(endpoint="https://mirror.invalid"))
    words = f"comes too late, huggingface_hub already uses {huggingface_hub.constants.ENDPOINT}; set HF_ENDPOINT"
    assert f"hub.endpoint: https://mirror.invalid {words}" in str(caught.value)
