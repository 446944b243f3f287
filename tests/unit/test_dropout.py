"""Dropout drawn as bits: the right share, the right scale, the right gradient, and the same again for the same seed."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from banjoray.training.dropout import FastDropout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARES = (0.05, 0.1, 0.5, 0.9)


def mode(seed: int = 0) -> FastDropout:
    return FastDropout(np.random.SFC64(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", SHARES)
def test_the_asked_share_is_zero_and_the_rest_is_scaled_so_that_the_mean_stays(
    share: float, dtype: torch.dtype
) -> None:
    cells = torch.ones(1000, 1000, dtype=dtype)
    with mode():
        dropped = functional.dropout(cells, share)
    zeros = float((dropped == 0).double().mean())
    # Five standard errors of a million draws, and half a step of the 16 bits that draw.
    assert abs(zeros - share) < 5 * (share * (1 - share) / 1e6) ** 0.5 + 2**-17
    assert len(set(dropped[dropped != 0].tolist())) == 1
    assert float(dropped.max()) == pytest.approx(1 / (1 - share), rel=5e-3 if dtype != torch.float32 else 1e-6)


def test_zeros_fall_independently_of_their_neighbours_and_of_other_calls() -> None:
    with mode():
        first, second = (functional.dropout(torch.ones(512, 512), 0.5) == 0 for _ in range(2))
    bound = 5 * 0.5 / 512
    for left, right in ((first, second), (first[:, 1:], first[:, :-1]), (first[1:], first[:-1])):
        both = float((left & right).double().mean())
        assert abs(both - 0.25) < bound


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 5), (1,), (0, 4)])
def test_any_shape_keeps_its_shape(shape: tuple[int, ...]) -> None:
    with mode():
        assert functional.dropout(torch.ones(shape), 0.3).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_pass_where_cells_did_and_at_the_same_scale(dtype: torch.dtype) -> None:
    cells = torch.randn(64, 64, dtype=dtype, requires_grad=True)
    with mode():
        dropped = functional.dropout(cells, 0.25)
    dropped.sum().backward()  # type: ignore[no-untyped-call]
    assert cells.grad is not None
    torch.testing.assert_close(cells.grad * cells, dropped, rtol=1e-2, atol=0)


def test_cells_that_do_not_lie_in_order_are_dropped_as_copies() -> None:
    cells = torch.randn(8, 16).t()
    with mode(3):
        turned = functional.dropout(cells, 0.5)
    with mode(3):
        plain = functional.dropout(cells.contiguous(), 0.5)
    assert torch.equal(turned, plain)


def test_a_seed_draws_the_same_again_and_another_seed_does_not() -> None:
    def drawn(seed: int) -> Tensor:
        with mode(seed):
            return functional.dropout(torch.ones(100), 0.5)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize(
    "call",
    [
        lambda cells: functional.dropout(cells, 0.5, training=False),
        lambda cells: functional.dropout(cells, 0.0),
        lambda cells: functional.dropout(cells, p=0.0, training=True),
        lambda cells: torch.nn.Dropout(0.5).eval()(cells),
    ],
)
def test_nothing_is_dropped_where_nothing_should_be(call: Callable[[Tensor], Tensor]) -> None:
    cells = torch.randn(10, 10)
    with mode():
        assert torch.equal(call(cells), cells)


def test_torchs_own_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with mode():
        functional.dropout(torch.ones(1000), 0.5)
    assert torch.equal(torch.rand(3), expected)


def attention(seed: int, share: float, **options: object) -> Tensor:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(2, 3, 6, 8) for _ in range(3))
    with mode():
        return functional.scaled_dot_product_attention(query, key, value, dropout_p=share, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.tensor([[True, True, True, True, False, False]]).expand(6, 6)},
        {"attn_mask": torch.tensor([[0.0, 0.5, -1.0, 0.0, -1e4, 0.0]]).expand(6, 6)},
    ],
    ids=["plain", "causal", "scaled", "bool mask", "added mask"],
)
def test_attention_is_torchs_when_hardly_anything_is_dropped(options: dict[str, object]) -> None:
    # A share below what 32 bits can draw: the path with dropout, and no cell dropped.
    torch.testing.assert_close(attention(1, 1e-12, **options), attention(1, 0.0, **options))


def test_attention_drops_probabilities_and_keeps_the_mean() -> None:
    values = torch.ones(1, 1, 400, 4)
    with mode():
        found = functional.scaled_dot_product_attention(values, values, values, dropout_p=0.2)
    assert found.std() > 0.001
    assert float(found.mean()) == pytest.approx(1, abs=0.01)
