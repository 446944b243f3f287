"""Text classification: one text or a pair of texts in, one of a fixed set of labels out."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from banjoray.config.job import DataConfig, JobConfig
from banjoray.data.splits import Split, Splits, labelled_splits, named_columns
from banjoray.data.tokens import Features, Tokens, encode_texts
from banjoray.errors import RequestError
from banjoray.tasks.task import Ask, Score, Seen, Task, log_softmax, only_known, text_of, whole_number

if TYPE_CHECKING:
    from torch import Tensor

_SHAPES = 'a text, a list of texts, {"text": ..., "text_pair": ...}, or a list of those'


class TextClassification(Task):
    """One label per text or pair; a softmax over ``AutoModelForSequenceClassification``'s logits."""

    name = "text-classification"
    auto_model = "AutoModelForSequenceClassification"
    metrics: tuple[str, ...] = ("accuracy", "f1_macro", "f1_weighted", "loss")
    labelled = True
    weighted = True

    def splits(self, job: JobConfig, token: str | None = None) -> Splits:
        """Texts, or pairs of texts, each with a label."""
        return labelled_splits(job, token)

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, data: DataConfig) -> Features:
        """A feature per row, cut to data.max_length."""
        return encode_texts(rows, tokenizer, data.max_length)

    def losses(self, outputs: Any, targets: "Tensor", smoothing: float) -> "Tensor":
        """Cross-entropy of ``outputs.logits`` (rows, labels)."""
        from torch.nn import functional

        return functional.cross_entropy(outputs.logits.float(), targets, reduction="none", label_smoothing=smoothing)

    def score(self, outputs: Sequence[np.ndarray], tokens: Tokens, rows: Split, labels: Sequence[str]) -> Score:
        """Accuracy, F1 and mean cross-entropy (nats) of logits, (labels,) each, against the label id of each row.

        F1 is averaged over the labels that occur in targets or predictions, as scikit-learn does.
        """
        logits, targets = np.stack(list(outputs)), np.asarray(tokens.targets)
        predicted = logits.argmax(axis=1)
        log_probabilities = log_softmax(logits.astype(np.float64))
        metrics = _metric().compute(predictions=predicted, references=targets)
        metrics["loss"] = float(-log_probabilities[np.arange(len(targets)), targets].mean())
        confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)
        np.add.at(confusion, (targets, predicted), 1)
        table = tuple(tuple(map(int, row)) for row in confusion)
        return Score(metrics, table, tuple(labels), _per_label(confusion, labels))

    def asked(self, data: DataConfig) -> dict[str, str]:
        """The text, and the second one of a pair."""
        return named_columns(data, ("text", "text_pair"))

    def parse(self, inputs: Any, parameters: Mapping[str, Any]) -> Ask:
        """Rows of {"text"} or {"text", "text_pair"}."""
        rows = inputs if isinstance(inputs, list) else [inputs]
        if not rows:
            raise RequestError(f"inputs: an empty list; needed {_SHAPES}")
        found = [_row(row, f"inputs[{number}]" if rows is inputs else "inputs") for number, row in enumerate(rows)]
        return Ask(found, parameters, rows is not inputs)

    def answer(self, ask: Ask, seen: Sequence[Seen], labels: Sequence[str], tokenizer: Any) -> Any:
        """A list per row, always as a list of lists: the client reads the first, and would misread a flat one.

        [{"label", "score"}] by falling score: all labels, or the first ``top_k``. ``function_to_apply`` is softmax (the
        default), sigmoid or none.
        """
        only_known(ask.parameters, ("top_k", "function_to_apply"), self.name)
        top_k = whole_number(ask.parameters, "top_k", len(labels))
        function = ask.parameters.get("function_to_apply")
        answers = []
        for row in seen:
            scores = _apply(row.outputs[0].astype(np.float64), "softmax" if function is None else function)
            best = np.argsort(-scores, kind="stable")[:top_k]
            answers.append([{"label": labels[number], "score": float(scores[number])} for number in best])
        return answers


def _per_label(confusion: np.ndarray, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of every label; 0 where a share has nothing to divide by."""
    right, support, answered = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    return {
        label: {
            "precision": float(right[number] / max(1, answered[number])),
            "recall": float(right[number] / max(1, support[number])),
            "f1": float(2 * right[number] / max(1, support[number] + answered[number])),
            "support": float(support[number]),
        }
        for number, label in enumerate(labels)
    }


def _row(found: Any, where: str) -> dict[str, str]:
    if not isinstance(found, str | dict):
        raise RequestError(f"{where}: found {type(found).__name__}; needed {_SHAPES}")
    row = {"text": found} if isinstance(found, str) else dict(found)
    if row.get("text_pair", "") is None:
        del row["text_pair"]
    if "text" not in row or not set(row) <= {"text", "text_pair"}:
        raise RequestError(f"{where}: found keys {sorted(map(str, row))}; needed text, and text_pair for a pair")
    return {key: text_of(cell, f"{where}.{key}") for key, cell in row.items()}


def _apply(logits: np.ndarray, function: Any) -> np.ndarray:
    scores: np.ndarray
    match function:
        case "softmax":
            scores = np.exp(log_softmax(logits))
        case "sigmoid":
            scores = np.exp(-np.logaddexp(0, -logits))
        case "none":
            scores = logits
        case _:
            raise RequestError(f"parameters.function_to_apply: found {function!r}; needed softmax, sigmoid or none")
    return scores


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
