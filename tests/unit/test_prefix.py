"""A model cut above its frozen bottom gives what the whole model gives."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from banjoray.config.train import Freeze, FreezeBitfit, FreezeLayers, FreezePatterns
from banjoray.models.freezing import freeze_parameters
from banjoray.models.prefix import Cut, frozen_depth, silence, trimmed
from banjoray.models.readout import read_first_only
from factories import DEPTH

CUT = ("bert", "distilbert", "roberta", "electra", "gpt2")


def classifier(base: Path, **config: Any) -> Any:
    """A model whose weights are large enough to tell positions apart."""
    import transformers

    torch.manual_seed(3)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, pad_token_id=0, **config
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def batch() -> dict[str, Tensor]:
    """Five rows of 3 to 9 tokens."""
    torch.manual_seed(4)
    lengths = torch.tensor([9, 7, 6, 4, 3])
    mask = (torch.arange(9) < lengths[:, None]).long()
    return {"input_ids": torch.randint(4, 200, mask.shape) * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("depth", range(DEPTH + 1))
@pytest.mark.parametrize("cut_top", [False, True])
def test_model_that_starts_above_the_cut_gives_the_same_outputs(
    bases: Mapping[str, Path], name: str, depth: int, cut_top: bool
) -> None:
    model = classifier(bases[name])
    if cut_top and not read_first_only(model):
        pytest.skip(f"the head of {name} reads another position")
    cut, inputs = Cut(model, depth), batch()
    with torch.inference_mode():
        whole = model(**inputs).logits
        cut.states = cut.below(inputs)
        assert cut.states.shape[1] == (1 if cut_top and depth == DEPTH else 9)
        narrow = trimmed(inputs, cut.states.shape[1])
        cut.start_above()
        torch.testing.assert_close(model(**narrow).logits, whole, rtol=1e-5, atol=1e-6)
        # From the states, not from the words: other states, other outputs.
        cut.states = cut.states.flip(0)
        assert not torch.allclose(model(**narrow).logits, whole, atol=1e-3)
        cut.restore()
        torch.testing.assert_close(model(**inputs).logits, whole)


@pytest.mark.parametrize(("depth", "lookups"), [(0, 1), (1, 0), (DEPTH, 0)])
def test_words_are_not_looked_up_where_nothing_reads_them(bases: Mapping[str, Path], depth: int, lookups: int) -> None:
    model, looked_up = classifier(bases["bert"]), []
    model.get_input_embeddings().register_forward_hook(lambda *given: looked_up.append(1))
    cut, inputs = Cut(model, depth), batch()
    with torch.inference_mode():
        cut.states = cut.below(inputs)
        looked_up.clear()
        cut.start_above()
        model(**inputs)
        assert len(looked_up) == lookups
        cut.restore()
        model(**inputs)
        assert len(looked_up) == lookups + 1


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("depth", range(DEPTH + 1))
def test_every_family_that_is_offered_agrees_with_itself(bases: Mapping[str, Path], name: str, depth: int) -> None:
    model = classifier(bases[name]).train()
    before = torch.get_rng_state()
    assert Cut(model, depth).agrees()
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert not [module for module in model.modules() if "forward" in vars(module) or module._forward_pre_hooks]


def test_model_whose_blocks_take_more_than_states_does_not_agree_and_is_left_whole(bases: Mapping[str, Path]) -> None:
    model = classifier(bases["bert"])
    first, _, third = model.bert.encoder.layer
    told: list[Tensor] = []
    plain = third.forward
    # The first block hands the third something beside the states, as T5's hands on its position bias.
    first.register_forward_hook(lambda module, given, states: told.append(states))
    third.forward = lambda states, *given, **named: plain(states + told.pop(), *given, **named)
    assert not Cut(model, 2).agrees()


@pytest.mark.parametrize(
    ("freeze", "depth"),
    [
        ("none", None),
        ("embeddings", 0),
        (FreezeLayers(layers=0), 0),
        (FreezeLayers(layers=2), 2),
        (FreezeLayers(layers=DEPTH), DEPTH),
        ("backbone", DEPTH),
        (FreezePatterns(patterns=["encoder.layer.0.*", "encoder.layer.1.*"]), None),
        (FreezePatterns(patterns=["embeddings.*", "encoder.layer.0.*", "encoder.layer.2.*"]), 1),
        (FreezeBitfit(bitfit=True), None),
    ],
    ids=str,
)
def test_bottom_reaches_as_far_as_everything_below_is_frozen(
    bases: Mapping[str, Path], freeze: Freeze, depth: int | None
) -> None:
    model = classifier(bases["bert"])
    freeze_parameters(model, freeze)
    assert frozen_depth(model) == depth


def test_shared_blocks_have_no_bottom(bases: Mapping[str, Path]) -> None:
    model = classifier(bases["albert"])
    freeze_parameters(model, "backbone")
    assert frozen_depth(model) is None


def test_adapters_in_a_block_end_the_bottom(bases: Mapping[str, Path]) -> None:
    from banjoray.config.train import AdapterConfig
    from banjoray.models.adapters import attach

    model = classifier(bases["bert"])
    attach(model, AdapterConfig(), FreezeLayers(layers=2), 0)
    assert frozen_depth(model) == 2


@pytest.mark.parametrize("name", CUT)
def test_bottom_has_no_dropout_and_what_is_above_keeps_it(bases: Mapping[str, Path], name: str) -> None:
    model = classifier(bases[name]).train()
    silence(model, 2)
    cut, inputs = Cut(model, 2), batch()
    first, second = cut.below(inputs), cut.below(inputs)
    assert torch.equal(first, second)
    stack = cut._blocks
    above = [module.p for module in stack[2].modules() if isinstance(module, nn.Dropout)]
    assert above
    assert min(above) > 0
    cut.restore()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
