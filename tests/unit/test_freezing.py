"""Freezing, for every family that a tiny model exists of: exactly the parameters that the job file names."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers

from banjoray.config.train import Freeze, FreezeBitfit, FreezeLayers, FreezePatterns
from banjoray.errors import ModelError
from banjoray.models.blocks import find_blocks, heights
from banjoray.models.freezing import freeze_parameters, frozen_names
from banjoray.models.loading import sketch
from banjoray.tasks.text_classification import TextClassification
from factories import ARCHITECTURES, DEPTH


class Family(NamedTuple):
    """How a family names its parts; written from its source, not asked from the code under test."""

    base: str
    embeddings: str
    block: str


FAMILIES = {
    "bert": Family("bert.", r"bert\.embeddings\.", r"bert\.encoder\.layer\.(\d+)\."),
    "distilbert": Family("distilbert.", r"distilbert\.embeddings\.", r"distilbert\.transformer\.layer\.(\d+)\."),
    "roberta": Family("roberta.", r"roberta\.embeddings\.", r"roberta\.encoder\.layer\.(\d+)\."),
    "electra": Family("electra.", r"electra\.embeddings(_project)?\.", r"electra\.encoder\.layer\.(\d+)\."),
    "gpt2": Family("transformer.", r"transformer\.w[tp]e\.", r"transformer\.h\.(\d+)\."),
    "albert": Family("albert.", r"albert\.(embeddings|encoder\.embedding_hidden_mapping_in)\.", r"(?!)"),
}
CUTTABLE = [name for name in ARCHITECTURES if name != "albert"]


ModelOf = Callable[[str], Any]


@pytest.fixture
def model_of(bases: Mapping[str, Path]) -> ModelOf:
    """Family -> a classifier without memory behind its weights; freezing needs names only."""
    return lambda family: sketch(transformers.AutoConfig.from_pretrained(bases[family]), TextClassification())


def frozen(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def names(model: Any) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def test_every_tiny_family_is_tested() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_none_freezes_nothing(model_of: ModelOf, architecture: str) -> None:
    model = model_of(architecture)
    freeze_parameters(model, "none")
    assert frozen(model) == set()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings_freezes_the_embeddings_alone(model_of: ModelOf, architecture: str) -> None:
    model = model_of(architecture)
    freeze_parameters(model, "embeddings")
    expected = {name for name in names(model) if re.match(FAMILIES[architecture].embeddings, name)}
    assert frozen(model) == expected
    assert len(expected) >= 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_backbone_leaves_the_head_alone_to_train(model_of: ModelOf, architecture: str) -> None:
    model = model_of(architecture)
    freeze_parameters(model, "backbone")
    head = {name for name in names(model) if not name.startswith(FAMILIES[architecture].base)}
    assert names(model) - frozen(model) == head
    assert head


@pytest.mark.parametrize("layers", range(DEPTH + 1))
@pytest.mark.parametrize("architecture", CUTTABLE)
def test_layers_freezes_the_embeddings_and_the_lowest_blocks(model_of: ModelOf, architecture: str, layers: int) -> None:
    model, family = model_of(architecture), FAMILIES[architecture]
    freeze_parameters(model, FreezeLayers(layers=layers))
    blocks = {name: re.match(family.block, name) for name in names(model)}
    expected = {name for name in blocks if re.match(family.embeddings, name)}
    expected |= {name for name, found in blocks.items() if found and int(found.group(1)) < layers}
    assert frozen(model) == expected
    assert len({found.group(1) for found in blocks.values() if found}) == DEPTH


def test_blocks_ten_and_one_are_not_mistaken_for_each_other() -> None:
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=12, num_attention_heads=1, intermediate_size=8
    )
    model = sketch(config, TextClassification())
    freeze_parameters(model, FreezeLayers(layers=2))
    numbers = {found.group(1) for name in frozen(model) if (found := re.search(r"layer\.(\d+)\.", name))}
    assert numbers == {"0", "1"}


@pytest.mark.parametrize("architecture", CUTTABLE)
def test_more_layers_than_there_are_is_refused_with_the_depth(model_of: ModelOf, architecture: str) -> None:
    with pytest.raises(ModelError, match=rf"^freeze\.layers: found {DEPTH + 1}; this model has {DEPTH} blocks \("):
        freeze_parameters(model_of(architecture), FreezeLayers(layers=DEPTH + 1))


def test_layers_of_a_model_that_shares_one_block_are_refused(model_of: ModelOf) -> None:
    with pytest.raises(ModelError) as caught:
        freeze_parameters(model_of("albert"), FreezeLayers(layers=1))
    message = str(caught.value)
    assert message.startswith("freeze.layers: AlbertForSequenceClassification shares 1 block between all its depths")
    assert message.endswith("use none, embeddings or backbone")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_are_found_whatever_the_family_calls_them(model_of: ModelOf, architecture: str) -> None:
    blocks = find_blocks(model_of(architecture))
    assert (blocks.depth, blocks.shared) == ((1, True) if architecture == "albert" else (DEPTH, False))


def encoder_decoder() -> Any:
    """A BART with two blocks below four."""
    config = transformers.BartConfig(
        vocab_size=9,
        d_model=8,
        encoder_layers=2,
        decoder_layers=4,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
    )
    config.num_labels = 2
    return sketch(config, TextClassification())


def test_the_encoder_is_the_stack_of_an_encoder_decoder() -> None:
    assert find_blocks(encoder_decoder()).stack == "encoder.layers"


@pytest.mark.parametrize("freeze", ["embeddings", FreezeLayers(layers=2)], ids=str)
def test_the_decoder_of_an_encoder_decoder_is_not_below_the_encoder(freeze: Freeze) -> None:
    model = encoder_decoder()
    freeze_parameters(model, freeze)
    assert {name for name in frozen(model) if "decoder" in name} == set()
    assert {"model.shared.weight", "model.encoder.embed_positions.weight"} < frozen(model)


def flat() -> Any:
    """A model without blocks."""
    from torch import nn

    class Flat(nn.Module):
        base_model_prefix = "flat"
        config = transformers.PreTrainedConfig()

        def __init__(self) -> None:
            super().__init__()
            self.flat = self.base_model = nn.Sequential(nn.Linear(2, 2))

    return Flat()


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^freeze: Sequential has no list of blocks; use none, backbone or patterns$"):
        find_blocks(flat())
    with pytest.raises(ModelError, match=r"^train\.layerwise_lr_decay: Sequential has no list of blocks; use 1\.0$"):
        heights(flat())


@pytest.mark.parametrize("architecture", CUTTABLE)
def test_heights_count_blocks_from_the_top(model_of: ModelOf, architecture: str) -> None:
    model, family = model_of(architecture), FAMILIES[architecture]
    found = heights(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, height in found.items():
        block = re.match(family.block, name)
        if block:
            assert height == DEPTH - int(block.group(1)), name
        else:
            assert height == (DEPTH + 1 if re.match(family.embeddings, name) else 0), name
    assert set(found.values()) == set(range(DEPTH + 2))


def test_heights_of_shared_blocks_are_one_and_two(model_of: ModelOf) -> None:
    for name, height in heights(model_of("albert")).items():
        expected = 2 if re.match(FAMILIES["albert"].embeddings, name) else 1 if "albert_layer" in name else 0
        assert height == expected, name


def test_heights_of_several_shared_groups_are_one_too() -> None:
    config = transformers.AlbertConfig(
        vocab_size=9,
        embedding_size=8,
        hidden_size=8,
        num_hidden_layers=4,
        num_hidden_groups=2,
        num_attention_heads=1,
        intermediate_size=8,
    )
    assert set(heights(sketch(config, TextClassification())).values()) == {0, 1, 2}


def test_heights_of_an_encoder_decoder_are_those_of_its_encoder() -> None:
    found = heights(encoder_decoder())
    assert {height for name, height in found.items() if "decoder." in name or "head" in name} == {0}
    assert {height for name, height in found.items() if "encoder.layers.0." in name} == {2}
    assert {height for name, height in found.items() if "encoder.layers.1." in name} == {1}
    assert found["model.shared.weight"] == 3


def test_heights_of_a_model_without_head(bases: Mapping[str, Path]) -> None:
    found = heights(transformers.AutoModel.from_pretrained(bases["bert"]))
    assert found["embeddings.word_embeddings.weight"] == DEPTH + 1
    assert found["encoder.layer.0.output.dense.bias"] == DEPTH
    assert found["pooler.dense.weight"] == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bitfit_trains_biases_and_the_head(model_of: ModelOf, architecture: str) -> None:
    model, base = model_of(architecture), FAMILIES[architecture].base
    freeze_parameters(model, FreezeBitfit(bitfit=True))
    trained = names(model) - frozen(model)
    assert trained == {name for name in names(model) if name.endswith(".bias") or not name.startswith(base)}
    assert {name for name in trained if not name.startswith(base)}
    assert {name for name in trained if name.startswith(base)}


def test_bitfit_of_a_base_without_biases_is_refused_with_what_to_do() -> None:
    config = transformers.T5Config(vocab_size=9, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    with pytest.raises(ModelError) as caught:
        freeze_parameters(sketch(config, TextClassification()), FreezeBitfit(bitfit=True))
    assert str(caught.value) == (
        "freeze.bitfit: the base model of T5ForSequenceClassification has no biases; "
        "use backbone to train the head alone, or an adapter"
    )


@pytest.mark.parametrize("prefix", ["bert.", ""], ids=["whole name", "name inside the base"])
def test_patterns_freeze_what_they_match_and_nothing_else(model_of: ModelOf, prefix: str) -> None:
    model = model_of("bert")
    patterns = [f"{prefix}encoder.layer.[02].*", f"{prefix}embeddings.word_*", "classifier.bias"]
    freeze_parameters(model, FreezePatterns(patterns=patterns))
    expected = {name for name in names(model) if re.match(r"bert\.encoder\.layer\.[02]\.", name)}
    assert frozen(model) == expected | {"bert.embeddings.word_embeddings.weight", "classifier.bias"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pattern_that_matches_nothing_is_refused_with_a_name_that_would(model_of: ModelOf, architecture: str) -> None:
    model = model_of(architecture)
    with pytest.raises(ModelError) as caught:
        freeze_parameters(model, FreezePatterns(patterns=["*.weight", "nothing.like.*"]))
    found = re.fullmatch(
        r"freeze\.patterns: 'nothing\.like\.\*' matches no parameter; names look like '(.+)'", str(caught.value)
    )
    assert found
    assert frozen_names(model, FreezePatterns(patterns=[found.group(1)]))


def test_freezing_everything_is_refused(model_of: ModelOf) -> None:
    with pytest.raises(ModelError, match=r"^freeze: .* leaves nothing to train; free at least one parameter$"):
        freeze_parameters(model_of("bert"), FreezePatterns(patterns=["*"]))


FREEZES: list[Freeze] = [
    "none",
    "embeddings",
    "backbone",
    FreezeLayers(layers=2),
    FreezePatterns(patterns=["*bias"]),
    FreezeBitfit(bitfit=True),
]


@pytest.mark.parametrize("freeze", FREEZES, ids=str)
def test_the_counts_are_numbers_of_weights(model_of: ModelOf, freeze: Freeze) -> None:
    model = model_of("bert")
    trainable, weights = freeze_parameters(model, freeze)
    assert weights == sum(parameter.numel() for parameter in model.parameters())
    assert trainable == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_freezing_again_frees_what_was_frozen_before(model_of: ModelOf) -> None:
    model = model_of("bert")
    freeze_parameters(model, "backbone")
    freeze_parameters(model, "embeddings")
    assert frozen(model) == frozen_names(model, "embeddings")
