"""A word table cut down to the words in use learns what the whole one would have learned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from banjoray.models.vocabulary import narrow
from factories import tiny_model

TEXTS = [np.array([2, 7, 9, 3], np.int32), np.array([2, 11, 9, 40, 3], np.int32)]
WORDS = [0, 2, 3, 7, 9, 11, 40]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny_model(folder / name, name) for name in ("bert", "distilbert", "roberta", "gpt2")}


def made(base: Path, **config: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    # In evaluation mode: without dropout, and gradients all the same.
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, **config)


def learn(model: Any, steps: int, decay: float = 0.1, rate: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, eps=1e-5)
    for _ in range(steps):
        for row in TEXTS:
            model(input_ids=torch.from_numpy(row)[None].long(), labels=torch.tensor([1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_training_the_words_in_use_is_training_the_whole_table(bases: Mapping[str, Path], architecture: str) -> None:
    whole, cut = made(bases[architecture]), made(bases[architecture])
    vocabulary = narrow(cut, TEXTS)
    assert vocabulary is not None
    learn(whole, 4)
    learn(cut, 4)
    expected = dict(whole.named_parameters())
    for name, parameter in cut.named_parameters():
        table = name == vocabulary.name
        found = vocabulary.whole(parameter.detach(), (1 - 1e-2 * 0.1) ** 4) if table else parameter
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-6)


def test_words_in_use_are_those_of_the_texts_and_the_padding(bases: Mapping[str, Path]) -> None:
    model = made(bases["bert"])
    vocabulary = narrow(model, TEXTS)
    assert vocabulary is not None
    assert vocabulary.rows.tolist() == WORDS
    assert vocabulary.name == "bert.embeddings.word_embeddings.weight"
    assert model.get_input_embeddings().weight.shape == (len(WORDS), 32)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta", "gpt2"])
def test_outputs_are_those_of_the_whole_table(bases: Mapping[str, Path], architecture: str) -> None:
    whole, cut = (made(bases[architecture], pad_token_id=0).eval() for _ in range(2))
    assert narrow(cut, TEXTS) is not None
    ids = torch.tensor([[2, 7, 9, 3, 0, 0], [2, 11, 9, 40, 3, 0]])
    mask = (ids != 0).long()
    with torch.inference_mode():
        expected, found = (model(input_ids=ids, attention_mask=mask).logits for model in (whole, cut))
    assert torch.equal(found, expected)


def test_padding_gets_no_gradient_in_the_cut_table_either(bases: Mapping[str, Path]) -> None:
    model = made(bases["bert"])
    narrow(model, TEXTS)
    model(input_ids=torch.tensor([[2, 7, 0, 0]]), labels=torch.tensor([1])).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[WORDS.index(0)].abs().sum() == 0
    assert gradient[WORDS.index(7)].abs().sum() > 0


def test_a_frozen_a_shared_or_a_mostly_used_table_stays_whole(bases: Mapping[str, Path]) -> None:
    from transformers import AutoModelForMaskedLM

    frozen = made(bases["bert"])
    frozen.get_input_embeddings().weight.requires_grad_(False)
    shared = AutoModelForMaskedLM.from_pretrained(bases["bert"])
    assert shared.get_output_embeddings().weight is shared.get_input_embeddings().weight
    used = made(bases["bert"])
    everything = [np.arange(used.config.vocab_size)]
    for model, texts in ((frozen, TEXTS), (shared, TEXTS), (used, everything)):
        before = model.get_input_embeddings().weight.shape
        assert narrow(model, texts) is None
        assert model.get_input_embeddings().weight.shape == before
