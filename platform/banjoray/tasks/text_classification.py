"""Text classification: one text or a pair of texts in, one of a fixed set of labels out.

Any number of labels is `multi_label`, a number is `regression`: classification.problem_type says which it is.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from banjoray.config.data import DataConfig
from banjoray.config.job import JobConfig
from banjoray.data.splits import Split, Splits, labelled_splits, named_columns
from banjoray.data.tokens import Features, Tokens, encode_texts
from banjoray.errors import RequestError
from banjoray.tasks.classification_scores import one_label, sigmoid
from banjoray.tasks.task import Ask, Score, Seen, Task, log_softmax, only_known, text_of, whole_number

if TYPE_CHECKING:
    from torch import Tensor

_SHAPES = 'a text, a list of texts, {"text": ..., "text_pair": ...}, or a list of those'


class TextClassification(Task):
    """One label per text or pair; a softmax over ``AutoModelForSequenceClassification``'s logits."""

    name = "text-classification"
    auto_model = "AutoModelForSequenceClassification"
    metrics: tuple[str, ...] = (
        "accuracy",
        "f1_macro",
        "f1_micro",
        "f1_weighted",
        "matthews",
        "loss",
        "calibration_error",
    )
    labelled = True
    weighted = True
    problem_type = "single_label_classification"
    highest_answers = True
    function = "softmax"
    """What makes scores of logits, where a request does not say."""

    def settled(self, job: JobConfig) -> Task:
        """The task for what the job's labels are: this one, `MultiLabel` or `Regression`."""
        from banjoray.tasks.multi_label import MultiLabel
        from banjoray.tasks.regression import Regression

        match job.classification.problem_type:
            case "multi_label":
                return MultiLabel()
            case "regression":
                return Regression()
        return self

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
        """Metrics, confusion and a table per label of logits, (labels,) each, against the label id of each row."""
        return one_label(np.stack(list(outputs)), np.asarray(tokens.targets), labels)

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

        [{"label", "score"}] by falling score: all labels, or the first ``top_k``. ``function_to_apply`` is softmax,
        sigmoid or none; where it is absent, what fits the labels: softmax for one label, sigmoid for several, none for
        a number. Of several labels each also has ``predicted``, whatever the function: true where its sigmoid score
        reaches its threshold.
        """
        only_known(ask.parameters, ("top_k", "function_to_apply"), self.name)
        top_k = whole_number(ask.parameters, "top_k", max(1, len(labels)))
        function = ask.parameters.get("function_to_apply")
        function = self.function if function is None else function
        return [self.entries(row.outputs[0].astype(np.float64), labels, function)[:top_k] for row in seen]

    def entries(self, logits: np.ndarray, labels: Sequence[str], function: Any) -> list[dict[str, Any]]:
        """What is answered of every label for one row's logits (labels,), by falling score."""
        scores = _apply(logits, function)
        best = np.argsort(-scores, kind="stable")
        return [{"label": labels[number], "score": float(scores[number])} for number in best]


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
            scores = sigmoid(logits)
        case "none":
            scores = logits
        case _:
            raise RequestError(f"parameters.function_to_apply: found {function!r}; needed softmax, sigmoid or none")
    return scores
