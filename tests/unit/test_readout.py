"""The top block without what no head reads: the same answers, the same gradients, less work."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from banjoray.models.readout import read_first_only

READ_THE_FIRST = ("bert", "distilbert", "roberta", "electra")


def classifier(base: Path, kind: str = "SequenceClassification") -> Any:
    """A model with dropout whose weights are large enough to tell positions apart."""
    import transformers

    torch.manual_seed(3)
    loader = getattr(transformers, f"AutoModelFor{kind}")
    model = loader.from_pretrained(base, num_labels=3, pad_token_id=0)
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


def gradients(model: Any) -> dict[str, Tensor]:
    """Of the sum of squared logits, by name."""
    model.zero_grad()
    model(**batch()).logits.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", READ_THE_FIRST)
def test_answers_and_gradients_are_those_of_the_whole_block(bases: Mapping[str, Path], name: str) -> None:
    model = classifier(bases[name])
    with torch.inference_mode():
        whole = model(**batch()).logits
    expected = gradients(model)
    assert read_first_only(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(**batch()).logits, whole, rtol=1e-5, atol=1e-6)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)


@pytest.mark.parametrize("name", READ_THE_FIRST)
def test_feed_forward_part_of_the_top_block_sees_one_position(bases: Mapping[str, Path], name: str) -> None:
    model = classifier(bases[name])
    seen: list[torch.Size] = []
    wide = [module for module in model.modules() if getattr(module, "out_features", 0) == 64]
    for module in wide:
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert read_first_only(model)
    seen.clear()
    model(**batch())
    assert [shape[1] for shape in seen] == [9] * (len(wide) - 1) + [1]


def no_hooks(model: Any) -> bool:
    return not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "albert"])
def test_model_that_reads_elsewhere_or_shares_its_blocks_is_left_whole(bases: Mapping[str, Path], name: str) -> None:
    model = classifier(bases[name])
    assert not read_first_only(model)
    assert no_hooks(model)


@pytest.mark.parametrize("kind", ["TokenClassification", "MaskedLM"])
def test_head_with_an_answer_per_token_is_left_whole(bases: Mapping[str, Path], kind: str) -> None:
    model = classifier(bases["bert"], kind)
    assert not read_first_only(model)
    assert no_hooks(model)


def test_head_that_reads_the_mean_of_all_positions_is_left_whole(bases: Mapping[str, Path]) -> None:
    model = classifier(bases["bert"])
    model.bert.pooler.forward = lambda states: states.mean(dim=1)
    assert not read_first_only(model)
    assert no_hooks(model)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_random_state_are_as_before(bases: Mapping[str, Path], training: bool) -> None:
    model = classifier(bases["roberta"]).train(training)
    before = torch.get_rng_state()
    assert read_first_only(model)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), before)


def test_model_loaded_to_be_scored_or_served_is_cut(tmp_path: Path, lively_model: Callable[..., Path]) -> None:
    from banjoray.models.loading import load_trained
    from banjoray.tasks.task import task_for

    folder = lively_model(tmp_path / "model")
    classifier(folder).save_pretrained(folder)
    model, _ = load_trained(folder, task_for("text-classification"))
    assert not no_hooks(model)
