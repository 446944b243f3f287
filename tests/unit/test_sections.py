"""A model can be run from any block to any other, and its marks say up to where two models are the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from banjoray.errors import ModelError
from banjoray.models.readout import read_first_only
from banjoray.models.sections import Sections, held_once, tensor_digest
from factories import ARCHITECTURES, DEPTH, tiny_model

ROWS = {
    "input_ids": torch.tensor([[2, 9, 17, 25, 33, 3], [2, 41, 49, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
}


def model_of(folder: Path, architecture: str = "bert", head: str = "SequenceClassification") -> Any:
    """A tiny model of random weights that are the same every time, with a head of its own for three labels."""
    if not folder.exists():
        tiny_model(folder, architecture)
    kind = getattr(transformers, f"AutoModelFor{head}")
    return kind.from_pretrained(folder, num_labels=3).eval()


def sections_of(model: Any) -> Sections:
    return Sections(model, held_once(model, {}))


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("architecture", [name for name in (*ARCHITECTURES, "modernbert") if name != "albert"])
def test_from_any_block_to_any_other_the_outputs_are_those_of_the_whole(
    architecture: str, head: str, tmp_path: Path
) -> None:
    model = model_of(tmp_path / architecture, architecture, head)
    read_first_only(model)
    sections = sections_of(model)
    with torch.inference_mode():
        wanted = model(**ROWS).logits
        for start in range(1, DEPTH + 1):
            states = sections.up(ROWS, None, 0, start)
            for end in range(start, DEPTH + 1):
                above = states if end == start else sections.up(ROWS, states, start, end)
                torch.testing.assert_close(sections.top(ROWS, above, end).logits, wanted)
        # A pass over a part leaves nothing behind.
        torch.testing.assert_close(model(**ROWS).logits, wanted)
    assert len(set(sections.marks)) == DEPTH


@pytest.mark.parametrize("architecture", ["albert", "t5"])
def test_a_model_without_a_cut_between_its_blocks_is_refused(architecture: str, tmp_path: Path) -> None:
    if architecture == "albert":
        model = model_of(tmp_path / "albert", "albert")
    else:
        config = transformers.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
        model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(ModelError, match="no cut between its blocks"):
        sections_of(model)


@pytest.mark.parametrize(
    ("path", "same"),
    [
        ("bert.embeddings.position_embeddings", 0),
        ("bert.encoder.layer.0.attention.self.query", 0),
        ("bert.encoder.layer.1.output.LayerNorm", 1),
        ("bert.encoder.layer.2.intermediate.dense", 2),
        ("bert.pooler.dense", 3),
        ("classifier", 3),
    ],
)
def test_marks_are_equal_below_the_first_weight_that_differs(path: str, same: int, tmp_path: Path) -> None:
    one, other = model_of(tmp_path / "bert"), model_of(tmp_path / "bert")
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        other.get_submodule(path).weight.view(-1)[0] += 1e-6
    pairs = zip(sections_of(one).marks, sections_of(other).marks, strict=True)
    assert [a == b for a, b in pairs] == [number < same for number in range(DEPTH)]


def test_marks_know_a_frozen_table_of_positions_and_a_projection_beside_the_stack(tmp_path: Path) -> None:
    for architecture, path in (("distilbert", "embeddings.position_embeddings"), ("electra", "embeddings_project")):
        one, other = model_of(tmp_path / architecture, architecture), model_of(tmp_path / architecture, architecture)
        changed = other.base_model.get_submodule(path).weight
        with torch.no_grad():
            changed.view(-1)[0] += 1e-3
        for model in (one, other):
            model.base_model.get_submodule(path).weight.requires_grad_(False)
        assert sections_of(one).marks[0] != sections_of(other).marks[0]


def test_the_top_block_is_another_one_where_it_computes_the_first_position_alone(tmp_path: Path) -> None:
    one, other = model_of(tmp_path / "bert"), model_of(tmp_path / "bert")
    assert read_first_only(one)
    pairs = zip(sections_of(one).marks, sections_of(other).marks, strict=True)
    assert [a == b for a, b in pairs] == [True, True, False]


def test_equal_weights_are_held_once_and_tied_ones_stay_tied(tmp_path: Path) -> None:
    known: dict[str, torch.nn.Parameter] = {}
    one, other = model_of(tmp_path / "bert", head="MaskedLM"), model_of(tmp_path / "bert", head="MaskedLM")
    with torch.inference_mode():
        wanted = [model(**ROWS).logits for model in (one, other)]
    held_once(one, known)
    held = set(known)
    held_once(other, known)
    for model, logits in zip((one, other), wanted, strict=True):
        assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
        with torch.inference_mode():
            torch.testing.assert_close(model(**ROWS).logits, logits)
    assert one.bert.embeddings.word_embeddings.weight is other.bert.embeddings.word_embeddings.weight
    # Heads that were drawn afresh.
    assert {known[digest].shape for digest in known if digest not in held} <= {(32, 32)}


def test_a_digest_tells_kinds_and_shapes_apart() -> None:
    found = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(8, dtype=torch.bfloat16), torch.tensor([0.0, 0, 0, 1])]
    assert len({tensor_digest(tensor) for tensor in found}) == len(found)
