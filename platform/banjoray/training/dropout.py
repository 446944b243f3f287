"""Dropout on CPUs at a tenth of the cost: masks from a fast generator, applied as bits.

`torch.nn.functional.dropout` draws one Bernoulli number per cell from a Mersenne twister: 18 % of a training step of
MiniLM on 2 cores. Here 16 (or, for fp32, 32) bits of SFC64 decide about a cell, so the probability is right to
2**-16; what is kept is scaled by the probability that is really drawn. Attention with dropout has no fused kernel on
CPUs, so its probabilities get their mask here too.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class _Masked(torch.autograd.Function):
    """``cells`` with a share of them set to 0 and the others scaled up."""

    @staticmethod
    def forward(context: Any, cells: Tensor, share: float, bits: np.random.SFC64) -> Tensor:
        """``share`` in (0, 1) is the probability of a 0."""
        whole = torch.int16 if cells.element_size() == 2 else torch.int32
        drawn = bits.random_raw(-(-cells.numel() * cells.element_size() // 8))
        numbers = torch.from_numpy(drawn.view(np.int16 if whole == torch.int16 else np.int32)[: cells.numel()])
        width = 1 << (8 * cells.element_size())
        dropped = round(share * width)
        # 0 or 1: writing the comparison into whole numbers is 5 times faster than a bool that has to be converted.
        mask = torch.empty(cells.shape, dtype=whole)
        torch.ge(numbers.view(cells.shape), dropped - width // 2, out=mask)
        context.mask, context.scale = mask, width / (width - dropped)
        return _apply(cells, mask, context.scale)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The same cells, scaled the same."""
        return _apply(gradients[0], context.mask, context.scale), None, None


def _apply(cells: Tensor, mask: Tensor, scale: float) -> Tensor:
    # A number's bits times 1 are the number, times 0 they are 0.
    kept = (cells.contiguous().view(mask.dtype) * mask).view(cells.dtype)
    return kept.mul_(scale)


class FastDropout(TorchFunctionMode):
    """While it is entered, dropout of CPU tensors in half or single precision is drawn from ``bits``."""

    def __init__(self, bits: np.random.SFC64) -> None:
        super().__init__()
        self._bits = bits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch instead of ``func``."""
        kwargs = kwargs or {}
        if func is functional.dropout:
            return self._dropout(*args, **kwargs)
        if func is functional.scaled_dot_product_attention and kwargs.get("dropout_p") and not kwargs.get("enable_gqa"):
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, cells: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return cells
        if p == 1 or cells.element_size() not in (2, 4):
            return functional.dropout(cells, p, training, inplace)
        masked: Tensor = _Masked.apply(cells, p, self._bits)  # type: ignore[no-untyped-call]
        return masked

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What `scaled_dot_product_attention` is defined as, softmax in fp32; (..., heads, tokens, width)."""
        scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        return self._dropout(probabilities, dropout_p) @ value
