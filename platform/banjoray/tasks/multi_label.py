"""Text classification with any number of labels per text: each has a score of its own, and a threshold."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from banjoray.config.job import JobConfig
from banjoray.data.splits import Split, Splits
from banjoray.data.targets import multi_label_splits
from banjoray.data.tokens import Tokens
from banjoray.tasks.classification_scores import USUAL_THRESHOLD, many_labels, sigmoid
from banjoray.tasks.task import Score, Task
from banjoray.tasks.text_classification import TextClassification

if TYPE_CHECKING:
    from torch import Tensor


class MultiLabel(TextClassification):
    """Any of the labels per text or pair; a sigmoid over each of the logits.

    Every evaluation of a run chooses the thresholds anew, so that the best checkpoint is the one that is best with
    thresholds of its own. Those stay with it, in its version's config.json under ``thresholds`` (label -> score), and
    every later score and answer is made with them. A score on the validation rows flatters: they were chosen there.
    """

    metrics = ("f1_macro", "f1_micro", "f1_weighted", "accuracy", "loss")
    weighted = False
    problem_type = "multi_label_classification"
    highest_answers = False
    function = "sigmoid"

    def __init__(self, thresholds: np.ndarray | None = None) -> None:
        self._thresholds = thresholds

    def settled(self, job: JobConfig) -> Task:
        """Itself."""
        return self

    def for_config(self, config: Any) -> "MultiLabel":
        """With the thresholds of a trained model."""
        found = getattr(config, "thresholds", None)
        if found is None:
            return self
        return MultiLabel(np.array([found[config.id2label[label]] for label in range(config.num_labels)]))

    def splits(self, job: JobConfig, token: str | None = None) -> Splits:
        """Texts, or pairs of texts, each with a list of labels."""
        return multi_label_splits(job, token)

    def losses(self, outputs: Any, targets: "Tensor", smoothing: float) -> "Tensor":
        """Binary cross-entropy of ``outputs.logits`` (rows, labels), the mean over a row's labels.

        ``smoothing`` is the share of each target that is spread over yes and no.
        """
        from torch.nn import functional

        wanted = targets.float() * (1 - smoothing) + smoothing / 2
        losses = functional.binary_cross_entropy_with_logits(outputs.logits.float(), wanted, reduction="none")
        return losses.mean(dim=1)

    def score(self, outputs: Sequence[np.ndarray], tokens: Tokens, rows: Split, labels: Sequence[str]) -> Score:
        """Metrics and a table per label, by the model's thresholds; without any, by those best for these rows."""
        return many_labels(np.stack(list(outputs)), np.asarray(tokens.targets), labels, self._thresholds)

    def same(self, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Of every label, whether both say that the row has it, or both that it has not."""
        thresholds = USUAL_THRESHOLD if self._thresholds is None else self._thresholds
        return np.asarray((sigmoid(found) >= thresholds) == (sigmoid(wanted) >= thresholds))

    def entries(self, logits: np.ndarray, labels: Sequence[str], function: Any) -> list[dict[str, Any]]:
        """[{"label", "score", "predicted"}]: every label, and whether its sigmoid score reaches its threshold."""
        thresholds = np.full(len(labels), USUAL_THRESHOLD) if self._thresholds is None else self._thresholds
        found = dict(zip(labels, (sigmoid(logits) >= thresholds).tolist(), strict=True))
        return [entry | {"predicted": found[entry["label"]]} for entry in super().entries(logits, labels, function)]
