"""Text classification whose answer is a number: how alike two texts are, say."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from banjoray.config.job import JobConfig
from banjoray.data.splits import Split, Splits
from banjoray.data.targets import number_splits
from banjoray.data.tokens import Tokens
from banjoray.errors import ConfigError
from banjoray.tasks.classification_scores import numbers
from banjoray.tasks.task import Score, Task
from banjoray.tasks.text_classification import TextClassification

if TYPE_CHECKING:
    from torch import Tensor

# What transformers calls an output that has no name.
NAME = "LABEL_0"
# Numbers that differ by no more are the same: a share of the number, at least as if it were 1.
NEAR = 0.01


class Regression(TextClassification):
    """A number per text or pair: the only logit, as it is."""

    metrics = ("pearson", "spearman", "mae", "loss")
    labelled = False
    weighted = False
    outputs = 1
    problem_type = "regression"
    highest_answers = False
    function = "none"

    def settled(self, job: JobConfig) -> Task:
        """Itself."""
        return self

    def splits(self, job: JobConfig, token: str | None = None) -> Splits:
        """Texts, or pairs of texts, each with a number; raises ConfigError for keys that are about labels."""
        for key, found in (("data.labels", job.data.labels), ("train.label_smoothing", job.train.label_smoothing)):
            if found:
                raise ConfigError(
                    f"{key}: found {found}; a number has no labels (problem_type regression); leave it out"
                )
        return number_splits(job, token)

    def losses(self, outputs: Any, targets: "Tensor", smoothing: float) -> "Tensor":
        """The squared error of ``outputs.logits`` (rows, 1)."""
        from torch.nn import functional

        return functional.mse_loss(outputs.logits.float().squeeze(-1), targets.float(), reduction="none")

    def score(self, outputs: Sequence[np.ndarray], tokens: Tokens, rows: Split, labels: Sequence[str]) -> Score:
        """How near the logits, (1,) each, are to the number of each row."""
        return numbers(np.stack(list(outputs))[:, 0], np.asarray(tokens.targets))

    def same(self, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Whether the numbers differ by less than a hundredth."""
        return np.asarray(np.abs(found - wanted) <= NEAR * np.maximum(1, np.abs(wanted)))

    def entries(self, logits: np.ndarray, labels: Sequence[str], function: Any) -> list[dict[str, Any]]:
        """[{"label": "LABEL_0", "score"}]: the number is the score, and no label has a name, as in transformers."""
        return super().entries(logits, (NAME,), function)
