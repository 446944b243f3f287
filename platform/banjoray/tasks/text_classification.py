"""Text classification: one text or a pair of texts in, one of a fixed set of labels out."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from banjoray.errors import RequestError
from banjoray.tasks.task import Score

if TYPE_CHECKING:
    from torch import Tensor

_SHAPES = 'a text, a list of texts, {"text": ..., "text_pair": ...}, or a list of those'


class TextClassification:
    """One label per text or pair; a softmax over ``AutoModelForSequenceClassification``'s logits."""

    name = "text-classification"
    auto_model = "AutoModelForSequenceClassification"
    metrics: tuple[str, ...] = ("accuracy", "f1_macro", "f1_weighted", "loss")

    def losses(self, outputs: Any, targets: "Tensor", smoothing: float) -> "Tensor":
        """Cross-entropy of ``outputs.logits`` (rows, labels)."""
        from torch.nn import functional

        return functional.cross_entropy(outputs.logits.float(), targets, reduction="none", label_smoothing=smoothing)

    def score(self, outputs: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> Score:
        """Accuracy, F1 and mean cross-entropy (nats) of logits (rows, labels) against label ids (rows,).

        F1 is averaged over the labels that occur in targets or predictions, as scikit-learn does.
        """
        predicted = outputs.argmax(axis=1)
        log_probabilities = _log_softmax(outputs.astype(np.float64))
        metrics = _metric().compute(predictions=predicted, references=targets)
        metrics["loss"] = float(-log_probabilities[np.arange(len(targets)), targets].mean())
        confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)
        np.add.at(confusion, (targets, predicted), 1)
        return Score(metrics, tuple(tuple(map(int, row)) for row in confusion), tuple(labels))

    def parse(self, inputs: Any) -> list[dict[str, str]]:
        """Rows of {"text"} or {"text", "text_pair"}."""
        rows = inputs if isinstance(inputs, list) else [inputs]
        if not rows:
            raise RequestError(f"inputs: an empty list; needed {_SHAPES}")
        return [_row(row, f"inputs[{number}]" if rows is inputs else "inputs") for number, row in enumerate(rows)]

    def answer(
        self, outputs: np.ndarray, labels: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[dict[str, str | float]]:
        """[{"label", "score"}] by falling score: all labels, or the first ``top_k``.

        ``function_to_apply`` is softmax (the default), sigmoid or none.
        """
        top_k = parameters.get("top_k")
        top_k = len(labels) if top_k is None else top_k
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise RequestError(f"parameters.top_k: found {top_k!r}; needed a whole number >= 1, or null for all")
        function = parameters.get("function_to_apply")
        scores = _apply(outputs.astype(np.float64), "softmax" if function is None else function)
        unknown = set(parameters) - {"top_k", "function_to_apply"}
        if unknown:
            raise RequestError(f"parameters: unknown {sorted(unknown)}; {self.name} has top_k, function_to_apply")
        best = np.argsort(-scores, kind="stable")[:top_k]
        return [{"label": labels[number], "score": float(scores[number])} for number in best]


def _row(found: Any, where: str) -> dict[str, str]:
    if not isinstance(found, str | dict):
        raise RequestError(f"{where}: found {type(found).__name__}; needed {_SHAPES}")
    row = {"text": found} if isinstance(found, str) else dict(found)
    if row.get("text_pair", "") is None:
        del row["text_pair"]
    if "text" not in row or not set(row) <= {"text", "text_pair"}:
        raise RequestError(f"{where}: found keys {sorted(map(str, row))}; needed text, and text_pair for a pair")
    for key, cell in row.items():
        if not isinstance(cell, str):
            raise RequestError(f"{where}.{key}: found {type(cell).__name__}; needed text")
        if not cell.strip():
            raise RequestError(f"{where}.{key}: found nothing but blanks; needed text")
        if any("\ud800" <= letter <= "\udfff" for letter in cell):
            raise RequestError(f"{where}.{key}: found half a character (a lone surrogate); needed text")
    return row


def _apply(logits: np.ndarray, function: Any) -> np.ndarray:
    scores: np.ndarray
    match function:
        case "softmax":
            scores = np.exp(_log_softmax(logits))
        case "sigmoid":
            scores = np.exp(-np.logaddexp(0, -logits))
        case "none":
            scores = logits
        case _:
            raise RequestError(f"parameters.function_to_apply: found {function!r}; needed softmax, sigmoid or none")
    return scores


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


@cache
def _metric() -> Any:
    """The metrics as an `evaluate.Metric`; `evaluate.load` would download a script for the same arithmetic."""
    import datasets
    import evaluate
    from sklearn.metrics import accuracy_score, f1_score

    class ClassificationMetrics(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> evaluate.MetricInfo:
            label = datasets.Value("int64")
            return evaluate.MetricInfo(
                description="Accuracy and F1 of one label per row.",
                citation="Pedregosa et al., JMLR 12 (2011), scikit-learn",
                inputs_description="predictions and references: label ids",
                features=datasets.Features({"predictions": label, "references": label}),
            )

        def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
            return {
                "accuracy": float(accuracy_score(references, predictions)),
                "f1_macro": float(f1_score(references, predictions, average="macro")),
                "f1_weighted": float(f1_score(references, predictions, average="weighted")),
            }

    # In memory: by default evaluate writes every call's rows to a file in the home folder.
    return ClassificationMetrics(keep_in_memory=True)
