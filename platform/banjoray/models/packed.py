"""Linear layers whose weights stand as the processor's products read them.

Products in bf16 on a CPU (oneDNN) bring the weights into an order of their own at every call, which takes a quarter of
a pass over one short text. Here that is done once per weight, at the first pass, and kept beside it: the weights of
these layers take twice the memory, as in fp32. Under autocast, whose weights are in fp32, every call also casts them; a
frozen bottom's need that once (`packed`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from banjoray.data.batches import rounded_up


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by a packed copy of its weight wherever gradients are off.

    The copy is made at the first such pass: the weight must not change, or be cast, after it.
    """

    def forward(self, states: Tensor) -> Tensor:
        """(..., out features) of (..., in features)."""
        if torch.is_grad_enabled():
            return super().forward(states)
        return _product(states, _packed(self.weight), self.bias, self.weight.dtype)


def pack(model: nn.Module, dtype: torch.dtype) -> None:
    """Have a model's linear layers, of ``dtype`` on the CPU, use packed weights, in place.

    Layers of other classes (GPT-2's) stay as they are, and all do on a torch or a processor without such products.
    """
    if not able(dtype):
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            # Only the product changes: hooks, weights and whoever holds the layer stay.
            module.__class__ = PackedLinear


class _CastLinear(nn.Linear):
    """A linear layer in fp32 that, where autocast is on and gradients are off, multiplies by a packed copy in bf16."""

    copy: Tensor | None

    def forward(self, states: Tensor) -> Tensor:
        """(..., out features) of (..., in features), in the number format that autocast gives them."""
        if torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu"):
            return super().forward(states)
        if self.copy is None:
            self.copy = _reordered(self.weight.bfloat16())
        bias = None if self.bias is None else self.bias.bfloat16()
        return _product(states, self.copy, bias, torch.bfloat16)


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """While the block runs, autocast to bf16 on the CPU packs a model's linear layers once, at their first pass.

    The weights must not change meanwhile. Where there are no such products, nothing changes.
    """
    found = [module for module in model.modules() if type(module) is nn.Linear] if able(torch.bfloat16) else []
    for module in found:
        module.__class__ = _CastLinear
        vars(module)["copy"] = None
    try:
        yield
    finally:
        for module in found:
            module.__class__ = nn.Linear
            del vars(module)["copy"]


@cache
def able(dtype: torch.dtype) -> bool:
    """Whether there are products with packed weights here, tried on a few numbers."""
    states, weight = (torch.linspace(-1, 1, 8 * rows).reshape(rows, 8).to(dtype) for rows in (3, 5))
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            found = _product(states, _packed(weight), None, dtype)
            return torch.allclose(found.float(), linear(states.float(), weight.float()), rtol=2e-2, atol=2e-2)
    except (AttributeError, TypeError, RuntimeError):
        # Both are parts of torch that its own compiler uses, and no others are promised them.
        return False


def _packed(weight: Any) -> Tensor:
    """The weight in the products' order; made once, also where several models hold the same weight."""
    if not hasattr(weight, "packed"):
        weight.packed = _reordered(weight)
    found: Tensor = weight.packed
    return found


def _reordered(weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)  # noqa: SLF001  see `able`
    return found


def _product(states: Tensor, packed: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The states, cast to ``dtype``, times a packed weight.

    oneDNN writes code for every number of rows that it meets, in 4 ms for each product on a CPU with AMX: so there may
    be a few more of them than were given.
    """
    rows = states.numel() // states.shape[-1]
    whole = rounded_up(rows)
    if rows == whole:
        given = states.to(dtype)
    else:
        given = states.new_empty((whole, states.shape[-1]), dtype=dtype)
        given[:rows] = states.reshape(rows, -1)
        # Any numbers would do, no row of a product sees another; but some that were left in memory multiply slowly.
        given[rows:] = 0
    found: Tensor = torch.ops.mkldnn._linear_pointwise(given, packed, bias, "none", [], "")  # noqa: SLF001  see `able`
    return found if rows == whole else found[:rows].view(*states.shape[:-1], -1)
