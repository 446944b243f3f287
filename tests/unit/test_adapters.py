"""Adapters, for every tiny family and every kind: what is trained, what stays, and that merging changes no answer."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from banjoray.config.train import AdapterConfig, Freeze, FreezeBitfit, FreezeLayers, FreezePatterns
from banjoray.errors import ConfigError, ModelError
from banjoray.models.adapters import adapted_names, attach, merge, save_adapter
from banjoray.models.blocks import heights
from banjoray.models.freezing import count_weights
from banjoray.models.loading import sketch
from banjoray.tasks.text_classification import TextClassification
from factories import ARCHITECTURES, DEPTH

KINDS = ("lora", "dora", "ia3")
ADDED = {
    "lora": {"lora_A.default.weight", "lora_B.default.weight"},
    "dora": {"lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"},
    "ia3": {"ia3_l.default"},
}
# Which layers of a block get an adapter; written from PEFT's tables and the families' sources.
USUAL = {
    "bert": ({"query", "value"}, {"key", "value", "dense"}),
    "roberta": ({"query", "value"}, {"key", "value", "dense"}),
    "electra": ({"query", "value"}, {"query", "key", "value", "dense"}),
    "gpt2": ({"c_attn"}, {"c_attn", "c_proj"}),
    "distilbert": ({"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"},) * 2,
    "albert": ({"query", "key", "value", "dense", "ffn", "ffn_output"},) * 2,
}
BLOCK = re.compile(r"\.(?:layer|h)\.(\d+)\.")
CUTTABLE = [name for name in ARCHITECTURES if name != "albert"]
ModelOf = Callable[[str], Any]


# PeftModel asks transformers for a name that transformers 5.23 calls deprecated; banjoray doesn't build one.
peft_model = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Operations as small as these take several times as long on two threads of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def classifiers(bases: Mapping[str, Path]) -> Mapping[str, Any]:
    """A classifier of three labels of every family."""
    loader = transformers.AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return {name: loader.from_pretrained(base, num_labels=3, dtype=torch.float32) for name, base in bases.items()}


@pytest.fixture
def model_of(classifiers: Mapping[str, Any]) -> ModelOf:
    """Family -> a copy of its classifier."""
    return lambda family: copy.deepcopy(classifiers[family])


def adapter(kind: str, **values: Any) -> AdapterConfig:
    return AdapterConfig.model_validate({"type": kind, "r": 4, "dropout": 0.0} | values)


def batch() -> dict[str, torch.Tensor]:
    """Four rows of seven tokens, the last two padded."""
    ids = torch.randint(4, 100, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[2:, 4:], mask[2:, 4:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(**batch()).logits
    return logits


def train(model: Any, steps: int = 2) -> Any:
    """Steps large enough that an adapter that is ignored would show in the outputs."""
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
    return model


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_and_head_are_trained_and_nothing_else_moves(model_of: ModelOf, architecture: str, kind: str) -> None:
    model = model_of(architecture)
    before, kept = values(model), type(model)
    head = {name for name in before if not name.startswith(f"{model.base_model_prefix}.")}
    assert attach(model, adapter(kind), "none", seed=0) is model
    added = adapted_names(model)
    assert type(model) is kept
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == added | head
    assert {plain(name) for name, _ in model.named_parameters()} == before.keys() | added
    start = values(model)
    now = values(train(model))
    moved = {name for name in now if not torch.equal(now[name], start[name])}
    assert moved == added | head
    assert all(torch.equal(now[name], before[plain(name)]) for name in now if name not in moved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_is_pefts_choice_or_all_linear_layers_of_the_blocks(
    model_of: ModelOf, architecture: str, kind: str
) -> None:
    model = attach(model_of(architecture), adapter(kind), "none", seed=0)
    ends = re.compile(rf"\.([^.]+)\.({'|'.join(map(re.escape, ADDED[kind]))})$")
    found = [match for name in adapted_names(model) if (match := ends.search(name))]
    assert len(found) == len(adapted_names(model))
    assert {match.group(1) for match in found} == USUAL[architecture][kind == "ia3"]
    assert {match.group(2) for match in found} == ADDED[kind]
    inside = {name for name in adapted_names(model) if heights(model)[name]}
    assert inside == adapted_names(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_changes_no_output(model_of: ModelOf, architecture: str, kind: str) -> None:
    adapted = attach(model_of(architecture), adapter(kind), "none", seed=0)
    torch.testing.assert_close(outputs(adapted), outputs(model_of(architecture)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_is_the_plain_model_with_the_adapted_outputs(model_of: ModelOf, architecture: str, kind: str) -> None:
    model = train(attach(model_of(architecture), adapter(kind), "none", seed=0))
    adapted = outputs(model)
    merged = copy.deepcopy(model)
    merge(merged)
    before = model_of(architecture)
    assert list(merged.state_dict()) == list(before.state_dict())
    assert [type(module) for module in merged.modules()] == [type(module) for module in before.modules()]
    assert adapted_names(merged) == set()
    torch.testing.assert_close(outputs(merged), adapted, atol=1e-5, rtol=0)
    assert not torch.allclose(outputs(before), adapted, atol=1e-2)
    torch.testing.assert_close(outputs(model), adapted)


def test_a_merged_model_is_saved_and_loaded_as_any_other(model_of: ModelOf, tmp_path: Path) -> None:
    model = train(attach(model_of("gpt2"), adapter("dora"), "none", seed=0))
    merge(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path)), outputs(model))


@peft_model
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_loads_what_was_saved_on_the_base_and_gives_the_same_outputs(
    model_of: ModelOf, bases: Mapping[str, Path], architecture: str, kind: str, tmp_path: Path
) -> None:
    from peft import PeftConfig, PeftModel

    model = train(attach(model_of(architecture), adapter(kind), "none", seed=0))
    save_adapter(model, tmp_path / "adapter", str(bases[architecture]))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base = PeftConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path
    torch.manual_seed(99)
    fresh = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    torch.testing.assert_close(outputs(loaded), outputs(model), atol=1e-6, rtol=0)


@peft_model
def test_the_auto_class_of_peft_finds_class_and_base_by_itself(
    model_of: ModelOf, bases: Mapping[str, Path], tmp_path: Path
) -> None:
    from peft import AutoPeftModel

    model = train(attach(model_of("bert"), adapter("lora"), FreezeLayers(layers=1), seed=0))
    save_adapter(model, tmp_path, str(bases["bert"]))
    loaded = AutoPeftModel.from_pretrained(str(tmp_path), num_labels=3)
    torch.testing.assert_close(outputs(loaded), outputs(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_config_lists_names_in_order(model_of: ModelOf, kind: str, tmp_path: Path) -> None:
    save_adapter(attach(model_of("bert"), adapter(kind), "none", seed=0), tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    lists = [value for value in config.values() if isinstance(value, list)]
    assert [sorted(value) for value in lists] == lists
    assert len(config["target_modules"]) > 1
    assert (config["modules_to_save"], config["base_model_name_or_path"]) == (["classifier"], "base")


@pytest.mark.parametrize("layers", range(DEPTH))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", CUTTABLE)
def test_frozen_layers_get_no_adapter(bases: Mapping[str, Path], architecture: str, kind: str, layers: int) -> None:
    model = drawn(bases, architecture)
    attach(model, adapter(kind), FreezeLayers(layers=layers), seed=0)
    blocks = {int(found.group(1)) for name in adapted_names(model) if (found := BLOCK.search(name))}
    assert blocks == set(range(layers, DEPTH))


def test_more_blocks_than_peft_keeps_apart_by_full_names_are_still_the_right_ones() -> None:
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=24, num_attention_heads=1, intermediate_size=8
    )
    model = attach(sketch(config, TextClassification()), adapter("lora"), FreezeLayers(layers=4), seed=0)
    layers = [name.removesuffix(".lora_A.default.weight") for name in adapted_names(model) if "lora_A" in name]
    expected = {
        f"bert.encoder.layer.{block}.attention.self.{end}" for block in range(4, 24) for end in ("query", "value")
    }
    assert sorted(layers) == sorted(expected)


def drawn(bases: Mapping[str, Path], architecture: str) -> Any:
    """A classifier without memory behind its weights."""
    return sketch(transformers.AutoConfig.from_pretrained(bases[architecture], num_labels=3), TextClassification())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_memory_the_counts_and_names_are_the_same(
    model_of: ModelOf, bases: Mapping[str, Path], architecture: str, kind: str
) -> None:
    sketched = attach(drawn(bases, architecture), adapter(kind), "none", seed=0)
    real = attach(model_of(architecture), adapter(kind), "none", seed=0)
    assert {weight.device.type for weight in sketched.parameters()} == {"meta"}
    assert count_weights(sketched) == count_weights(real)
    assert {name: weight.shape for name, weight in sketched.named_parameters()} == {
        name: weight.shape for name, weight in real.named_parameters()
    }


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_seed_alone_decides_the_first_values(model_of: ModelOf, kind: str) -> None:
    def first(seed: int, noise: int) -> dict[str, torch.Tensor]:
        model = model_of("bert")
        torch.manual_seed(noise)
        attach(model, adapter(kind), "none", seed)
        return {name: weight for name, weight in values(model).items() if "lora_A" in name}

    one, same, other = first(1, 10), first(1, 20), first(2, 10)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_random_numbers_go_on_as_if_nothing_had_happened(model_of: ModelOf, kind: str) -> None:
    model = model_of("bert")
    before = torch.get_rng_state()
    attach(model, adapter(kind), "none", seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_rank_scale_and_dropout_are_the_jobs(model_of: ModelOf) -> None:
    model = attach(model_of("bert"), adapter("lora", r=2, alpha=6, dropout=0.25), "none", seed=0)
    layer = model.bert.encoder.layer[0].attention.self.query
    assert (layer.lora_A["default"].weight.shape, layer.scaling["default"]) == ((2, 32), 3.0)
    assert layer.lora_dropout["default"].p == 0.25
    assert attach(model_of("bert"), adapter("lora", alpha=2.5), "none", seed=0).peft_config["default"].lora_alpha == 2.5


def test_named_layers_get_an_adapter_in_every_block_or_in_the_one_that_is_named(model_of: ModelOf) -> None:
    wanted = ["key", "layer.2.output.dense"]
    model = attach(model_of("bert"), adapter("lora", target_modules=wanted), "none", seed=0)
    layers = {name.partition(".lora")[0] for name in adapted_names(model)}
    expected = {f"bert.encoder.layer.{block}.attention.self.key" for block in range(DEPTH)}
    assert layers == expected | {"bert.encoder.layer.2.output.dense"}


@pytest.mark.parametrize(
    ("architecture", "wanted", "inputs"),
    [
        ("distilbert", "auto", {"lin2"}),
        ("albert", "auto", {"ffn_output"}),
        ("electra", ["query", "output.dense"], {"dense"}),
        ("gpt2", "auto", {"c_proj"}),
        ("gpt2", ["c_attn", "c_fc"], set()),
    ],
)
def test_ia3_scales_inputs_where_a_feed_forward_part_narrows(
    model_of: ModelOf, architecture: str, wanted: Any, inputs: set[str]
) -> None:
    model = attach(model_of(architecture), adapter("ia3", target_modules=wanted), "none", seed=0)
    scaled = {name for name, module in model.named_modules() if getattr(module, "is_feedforward", False)}
    assert {name.rpartition(".")[2] for name in scaled} == inputs
    assert not any("attention" in name for name in scaled)


def test_a_head_keeps_its_linear_layers_without_adapter(model_of: ModelOf) -> None:
    model = attach(model_of("roberta"), adapter("lora", target_modules=["dense"]), "none", seed=0)
    assert isinstance(model.classifier.dense, torch.nn.Linear)


def test_an_encoder_decoder_gets_adapters_in_both_and_none_in_frozen_encoder_blocks() -> None:
    config = transformers.BartConfig(
        vocab_size=9,
        d_model=8,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
    )
    model = attach(sketch(config, TextClassification()), adapter("lora"), FreezeLayers(layers=1), seed=0)
    blocks = {".".join(name.split(".")[1:4]) for name in adapted_names(model)}
    assert blocks == {"encoder.layers.1", "decoder.layers.0", "decoder.layers.1", "decoder.layers.2"}


def test_a_model_without_head_trains_its_adapters_alone(bases: Mapping[str, Path]) -> None:
    model = transformers.AutoModel.from_pretrained(bases["bert"])
    attach(model, adapter("lora"), "none", seed=0)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == adapted_names(model)
    assert len(trained) == DEPTH * 4


REFUSED: list[Freeze] = ["embeddings", "backbone", FreezePatterns(patterns=["*"]), FreezeBitfit(bitfit=True)]


@pytest.mark.parametrize("freeze", REFUSED, ids=str)
def test_other_freezes_are_refused(bases: Mapping[str, Path], freeze: Freeze) -> None:
    with pytest.raises(ConfigError, match=r"^adapter: found freeze .*; an adapter goes with freeze none or \{"):
        attach(drawn(bases, "bert"), adapter("lora"), freeze, seed=0)


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        ("querry", "did you mean query?"),
        ("self.quary", "did you mean self.query?"),
        ("c_attn", "there are dense, key, query, value"),
        ("ery", "did you mean query?"),
        ("classifier", "there are dense, key, query, value"),
    ],
)
def test_a_layer_that_is_not_there_is_refused_with_near_ones(bases: Mapping[str, Path], wanted: str, hint: str) -> None:
    with pytest.raises(ModelError) as caught:
        attach(drawn(bases, "bert"), adapter("lora", target_modules=["value", wanted]), "none", seed=0)
    assert str(caught.value) == (
        f"adapter.target_modules: '{wanted}' matches no linear layer in the base of "
        f"BertForSequenceClassification; {hint}"
    )


def test_a_freeze_that_leaves_no_block_is_refused(bases: Mapping[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"^adapter: of the 6 layers .* leaves none; freeze fewer layers, or leave"):
        attach(drawn(bases, "bert"), adapter("lora"), FreezeLayers(layers=DEPTH), seed=0)


def test_layers_of_a_model_that_shares_blocks_are_refused(bases: Mapping[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"^freeze\.layers: AlbertForSequenceClassification shares 1 block"):
        attach(drawn(bases, "albert"), adapter("lora"), FreezeLayers(layers=1), seed=0)


def test_a_refused_adapter_leaves_the_model_as_it_was(model_of: ModelOf) -> None:
    model = model_of("bert")
    with pytest.raises(ModelError):
        attach(model, adapter("lora", target_modules=["querry"]), "none", seed=0)
    assert list(model.state_dict()) == list(model_of("bert").state_dict())
    assert all(weight.requires_grad for weight in model.parameters())


def test_peft_is_imported_only_where_adapters_are_used() -> None:
    script = (
        "import sys, torch, transformers; from banjoray.models.adapters import adapted_names, merge\n"
        "model = torch.nn.Linear(2, 2); merge(model); adapted_names(model)\n"
        "assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path)}, check=True)
