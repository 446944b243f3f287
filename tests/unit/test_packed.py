"""Packed linear layers: the products are those of plain ones, and a weight is packed once."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from banjoray.models import packed as packing
from banjoray.models.packed import PackedLinear, able, pack, packed
from banjoray.models.sections import held_once
from banjoray.training.strategies import native_bf16

FP32 = torch.float32
pytestmark = pytest.mark.skipif(not able(FP32), reason="this torch has no products with packed weights")


def layers(dtype: torch.dtype = FP32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 7, bias=False)).to(dtype)


@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 5, 48), (2, 8, 48), (4, 1, 48), (0, 5, 48), (3, 47, 48)])
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


def test_products_of_many_lengths_are_of_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, product = layers(), torch.ops.mkldnn._linear_pointwise
    pack(model, FP32)
    shapes: set[int] = set()

    def counting(states: torch.Tensor, *others: Any) -> Any:
        shapes.add(states.numel() // states.shape[-1])
        return product(states, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counting)
    with torch.inference_mode():
        for rows in (*range(1, 9), *range(513, 1025)):
            assert model(torch.ones(rows, 48)).shape == (rows, 7)
    assert shapes == {*range(1, 9), 576, 640, 704, 768, 832, 896, 960, 1024}


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


@pytest.mark.skipif(not native_bf16("cpu"), reason="this processor has no bf16")
@pytest.mark.parametrize("bias", [True, False])
def test_layers_in_fp32_multiply_as_autocast_has_it_while_the_block_runs(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96, bias=bias), nn.GELU(), nn.Linear(96, 7))
    states = torch.randn(2, 5, 48)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            wanted = model(states)
        with packed(model), torch.autocast("cpu", torch.bfloat16):
            assert type(model[0]) is not nn.Linear
            given, again = model(states), model(states)
    assert (given.shape, given.dtype) == (wanted.shape, torch.bfloat16)
    assert torch.equal(given, again)
    assert torch.allclose(given.float(), wanted.float(), rtol=2e-2, atol=2e-2)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_without_autocast_or_with_gradients_the_block_changes_nothing() -> None:
    model, states = layers(), torch.randn(3, 48)
    wanted = model(states)
    with packed(model):
        with torch.inference_mode():
            assert torch.equal(model(states), wanted)
        with torch.autocast("cpu", torch.bfloat16):
            model(states).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_layers_are_plain_again_after_the_block_also_after_an_error() -> None:
    model = layers()
    with pytest.raises(ZeroDivisionError), packed(model):
        _ = 1 // 0
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]
    model(torch.randn(3, 48)).sum().backward()
    assert "copy" not in vars(model[0])


@pytest.fixture
def tried_again() -> Iterator[None]:
    able.cache_clear()
    yield
    able.cache_clear()


@pytest.mark.usefixtures("tried_again")
def test_products_are_found_under_autocast_too() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert able(FP32)


@pytest.mark.usefixtures("tried_again")
@pytest.mark.parametrize("error", [AttributeError("no such operator"), RuntimeError("this CPU lacks it"), None])
def test_where_products_are_missing_or_wrong_layers_stay_plain(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def product(states: torch.Tensor, *_: object) -> torch.Tensor:
        if error is not None:
            raise error
        return torch.zeros(len(states), 5)

    monkeypatch.setattr(packing, "_product", product)
    model = layers()
    pack(model, FP32)
    assert type(model[0]) is nn.Linear
