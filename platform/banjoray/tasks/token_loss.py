"""The loss of models that predict tokens: cross-entropy by token, perplexity, and what evaluation keeps of them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from banjoray.data.tokens import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

# A token of an evaluation counts for so many: its logits are as wide as the vocabulary (250 MB for 2,048 tokens of
# BERT's 30,522 words).
WIDE = 4


def token_losses(logits: "Tensor", targets: "Tensor", smoothing: float) -> "Tensor":
    """The mean cross-entropy (rows,), fp32, of every row's known targets; 0 where a row has none.

    ``logits`` (rows, tokens, vocabulary) against ``targets`` (rows, tokens), `IGNORED` where there is none.
    """
    return _summed(logits, targets, smoothing) / _known(targets).clamp(min=1)


def token_sums(logits: "Tensor", targets: "Tensor") -> list[np.ndarray]:
    """Of every row (2,): the summed cross-entropy of its known targets in nats, and how many they are."""
    import torch

    # Row by row: the log-softmax is as large as the logits.
    sums = torch.cat([_summed(logits[row : row + 1], targets[row : row + 1], 0.0) for row in range(len(targets))])
    return list(torch.stack([sums, _known(targets).to(sums.dtype)], dim=1).cpu().numpy())


def token_metrics(outputs: Sequence[np.ndarray]) -> dict[str, float]:
    """``loss`` (nats per token, over all tokens of a split) and its exponential, ``perplexity``, from `token_sums`."""
    total, known = np.stack(list(outputs)).astype(np.float64).sum(axis=0)
    loss = float(total / max(1.0, known))
    # Of a loss above 700 the exponential is no number any more.
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _summed(logits: "Tensor", targets: "Tensor", smoothing: float) -> "Tensor":
    from torch.nn import functional

    losses = functional.cross_entropy(
        logits.float().flatten(0, 1),
        targets.flatten(),
        reduction="none",
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )
    return losses.reshape(targets.shape).sum(dim=1)


def _known(targets: "Tensor") -> "Tensor":
    return (targets != IGNORED).sum(dim=1)
