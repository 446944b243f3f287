"""What tasks have in common whose answers are texts: how they learn, are scored while they learn, and write."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from banjoray.data.splits import Split
from banjoray.data.tokens import Feature, Tokens
from banjoray.tasks.generation import write
from banjoray.tasks.settings import Settings
from banjoray.tasks.task import Score, Task
from banjoray.tasks.token_loss import WIDE, token_losses, token_metrics, token_sums

if TYPE_CHECKING:
    from torch import Tensor


class Writer(Task):
    """A model that is told the right tokens before each one it has to find, and then writes without being told."""

    metrics: tuple[str, ...] = ("loss", "perplexity")
    generates = True

    def losses(self, outputs: Any, targets: "Tensor", smoothing: float) -> "Tensor":
        """The mean cross-entropy of every feature's targets."""
        return token_losses(outputs.logits, targets, smoothing)

    def sizes(self, tokens: Tokens) -> np.ndarray:
        """The tokens, for the width of the logits."""
        return tokens.lengths * WIDE

    def kept(self, outputs: Any, inputs: "Mapping[str, Tensor]", targets: "Tensor | None") -> list[np.ndarray]:
        """Of every feature (2,): the summed cross-entropy of its targets, and how many they are."""
        assert targets is not None
        return token_sums(outputs.logits, targets)

    def score(self, outputs: Sequence[np.ndarray], tokens: Tokens, rows: Split, labels: Sequence[str]) -> Score:
        """Cross-entropy per token, and perplexity."""
        return Score(token_metrics(outputs))

    def generate(self, model: Any, features: Sequence[Feature], tokenizer: Any) -> list[np.ndarray]:
        """The tokens of what is written for every feature, the one that ends it too; log-probabilities if wanted."""
        return write(model, features, tokenizer)

    def probe(self, tokenizer: Any) -> Feature:
        """A text for which one token is written."""
        return Feature({"input_ids": [tokenizer.pad_token_id] * 8}, settings=Settings((("max_new_tokens", 1),)))
