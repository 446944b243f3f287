"""Packed linear layers: the products are those of plain ones, and a weight is packed once."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from banjoray.models import packed
from banjoray.models.packed import PackedLinear, able, pack
from banjoray.models.sections import held_once
from banjoray.training.strategies import native_bf16

FP32 = torch.float32
pytestmark = pytest.mark.skipif(not able(FP32), reason="this torch has no products with packed weights")


def layers(dtype: torch.dtype = FP32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 7, bias=False)).to(dtype)


@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 5, 48), (4, 1, 48), (0, 5, 48)])
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_packed_layers_give_what_plain_ones_give(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if dtype != FP32 and not native_bf16("cpu"):
        pytest.skip("this processor has no bf16")
    plain = layers(dtype)
    found = copy.deepcopy(plain)
    pack(found, dtype)
    assert [type(layer) for layer in found] == [PackedLinear, nn.GELU, PackedLinear]
    states = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        given, wanted = found(states), plain(states)
    assert (given.shape, given.dtype) == (wanted.shape, dtype)
    near = 1e-5 if dtype == FP32 else 2e-2
    assert torch.allclose(given.float(), wanted.float(), rtol=near, atol=near)


def test_gradients_go_through_the_plain_product() -> None:
    model = layers()
    pack(model, FP32)
    model(torch.randn(3, 48)).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_weight_is_packed_once_also_where_models_hold_it_together(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = layers(), layers()
    known: Any = {}
    for model in (one, other):
        pack(model, FP32)
        held_once(model, known)
    orders = torch.ops.mkldnn._reorder_linear_weight
    counted: list[object] = []

    def counting(*given: Any) -> Any:
        counted.append(given)
        return orders(*given)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", counting)
    states = torch.randn(2, 48)
    with torch.inference_mode():
        assert torch.equal(one(states), other(states))
        assert torch.equal(one(states), other(states))
    # Of two models with two layers each.
    assert len(counted) == 2


@pytest.fixture
def tried_again() -> Iterator[None]:
    able.cache_clear()
    yield
    able.cache_clear()


@pytest.mark.usefixtures("tried_again")
@pytest.mark.parametrize("error", [AttributeError("no such operator"), RuntimeError("this CPU lacks it"), None])
def test_where_products_are_missing_or_wrong_layers_stay_plain(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def product(states: torch.Tensor, *_: object) -> torch.Tensor:
        if error is not None:
            raise error
        return torch.zeros(len(states), 5)

    monkeypatch.setattr(packed, "_product", product)
    model = layers()
    pack(model, FP32)
    assert type(model[0]) is nn.Linear
