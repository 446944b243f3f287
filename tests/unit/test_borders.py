"""Rows near a border between two labels: which they are, and that their logits are those of fp32."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from banjoray.serving.borders import OnBorders, border_of, share_within

ROWS, LABELS, MOVED = 4000, 6, 0.2


class Fixed:
    """A model whose logits are a table, of which ``input_ids`` names the rows; what it was given is kept."""

    config = SimpleNamespace(id2label={})

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.given = table, list[dict[str, torch.Tensor]]()

    def __call__(self, **inputs: torch.Tensor) -> Any:
        self.given.append(inputs)
        return SimpleNamespace(logits=self.table[inputs["input_ids"][:, 0]].clone())

    def to(self, device: torch.device) -> "Fixed":
        raise ValueError(device)


@pytest.fixture
def models() -> tuple[Fixed, Fixed]:
    torch.manual_seed(1)
    plain = torch.randn(ROWS, LABELS)
    return Fixed(plain + MOVED * (torch.rand(ROWS, LABELS) - 0.5)), Fixed(plain)


def rows(count: int) -> dict[str, torch.Tensor]:
    """As many rows, of one to seven tokens each."""
    mask = (torch.arange(7) <= torch.arange(count)[:, None] % 7).long()
    return {"input_ids": torch.arange(count)[:, None].expand(count, 7), "attention_mask": mask}


def test_every_label_is_that_of_fp32_though_rounding_changed_some(models: tuple[Fixed, Fixed]) -> None:
    rounded, plain = models
    flipped = rounded.table.argmax(1) != plain.table.argmax(1)
    assert flipped.sum() > 100
    border = border_of(list(rounded.table.numpy()), list(plain.table.numpy()))
    found = OnBorders(rounded, plain, border)(**rows(ROWS)).logits
    assert torch.equal(found.argmax(1), plain.table.argmax(1))
    # Those of others are as they were, and others there are.
    again = plain.given[0]["input_ids"][:, 0]
    assert 0 < len(again) < 0.4 * ROWS
    far = torch.ones(ROWS, dtype=torch.bool)
    far[again] = False
    assert torch.equal(found[far], rounded.table[far])
    assert torch.equal(found[again], plain.table[again])
    assert share_within(list(rounded.table.numpy()), border) == pytest.approx(len(again) / ROWS)


def test_rows_are_computed_again_without_the_padding_of_the_others(models: tuple[Fixed, Fixed]) -> None:
    rounded, plain = models
    rounded.table[:7] = torch.eye(LABELS)[0] * 9
    rounded.table[2] = 0
    OnBorders(rounded, plain, 0.1)(**rows(7))
    assert plain.given[0]["input_ids"].tolist() == [[2, 2, 2]]
    assert plain.given[0]["attention_mask"].tolist() == [[1, 1, 1]]


def test_rows_that_are_far_from_borders_are_computed_once(models: tuple[Fixed, Fixed]) -> None:
    rounded, plain = models
    rounded.table[:7] = torch.eye(LABELS)[0] * 9
    assert OnBorders(rounded, plain, 8.9)(**rows(7)).logits.shape == (7, LABELS)
    assert not plain.given


def test_a_border_is_how_far_the_highest_logit_was_raised_over_another() -> None:
    plain = [np.array([1.0, 2.0, 3.0]), np.array([4.0, 0.0, 0.0])]
    # All moved alike is nothing; nor is what the others moved against each other, and the highest fell.
    moved = [plain[0] + 7, plain[1] + np.array([-0.5, 0.25, -0.25])]
    assert border_of(moved, plain) == 0
    raised = [plain[0] + np.array([0.0, -0.5, 0.25]), moved[1]]
    assert border_of(raised, plain) == 0.75
    assert share_within(raised, 1.75) == 0.5


def test_a_device_is_refused_as_the_rounded_model_refuses_it(models: tuple[Fixed, Fixed]) -> None:
    with pytest.raises(ValueError, match="cuda"):
        OnBorders(*models, 0.1).to(torch.device("cuda"))
