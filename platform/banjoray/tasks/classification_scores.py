"""What answers of text classification are worth: one label per row, any number of labels, or a number."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from banjoray.tasks.task import Score, log_softmax

# A label's threshold where nothing speaks for another one.
USUAL_THRESHOLD = 0.5
# Digits in which scores are told apart for a threshold: a pass over other rows rounds differently behind them.
_DIGITS = 6
# Of predictions that differ by less than this share of the largest, only rounding is left: they are constant.
_CONSTANT = 1e-5


def one_label(logits: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> Score:
    """The score of logits (rows, labels) against the label id of each row; ``loss`` is cross-entropy in nats.

    F1 is averaged over the labels that occur in targets or predictions, as scikit-learn does.
    """
    from sklearn.metrics import confusion_matrix

    predicted = logits.argmax(axis=1)
    log_probabilities = log_softmax(logits.astype(np.float64))
    metrics = _metric().compute(predictions=predicted, references=targets)
    metrics["loss"] = float(-log_probabilities[np.arange(len(targets)), targets].mean())
    metrics["calibration_error"] = calibration_error(np.exp(log_probabilities.max(axis=1)), predicted == targets)
    confusion = confusion_matrix(targets, predicted, labels=range(len(labels))).tolist()
    return Score(metrics, tuple(map(tuple, confusion)), tuple(labels), _per_label(targets, predicted, labels))


def calibration_error(confidences: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """The expected calibration error, from 0 to 1: how far confidences (rows,) are from the share of right answers.

    Over bins of equal width, the mean distance of the two weighted by rows (Naeini et al. 2015; Guo et al. 2017,
    arXiv:1706.04599, whose number of bins is usual).
    """
    number = np.digitize(confidences, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    distances = np.abs(np.bincount(number, weights=confidences - right, minlength=bins))
    return float(distances.sum() / len(confidences))


def many_labels(logits: np.ndarray, targets: np.ndarray, labels: Sequence[str], thresholds: np.ndarray | None) -> Score:
    """The score of logits (rows, labels) against targets (rows, labels), 1 where a row has a label.

    A row has the labels whose sigmoid score is at least their threshold; ``thresholds`` None: those that are best for
    these rows, see `chosen_thresholds`. ``accuracy`` is the share of rows with all their labels and no other; F1 is
    averaged over all labels, and 0 for one that is neither there nor found; ``loss`` is binary cross-entropy in nats
    per row and label. ``per_label`` has the threshold too.
    """
    from sklearn.metrics import accuracy_score, f1_score

    logits = logits.astype(np.float64)
    scores = sigmoid(logits)
    thresholds = chosen_thresholds(scores, targets) if thresholds is None else thresholds
    predicted = (scores >= thresholds).astype(np.int8)
    metrics = {
        f"f1_{average}": float(f1_score(targets, predicted, average=average, zero_division=0))
        for average in ("macro", "micro", "weighted")
    }
    metrics["accuracy"] = float(accuracy_score(targets, predicted))
    metrics["loss"] = float((np.logaddexp(0, logits) - logits * targets).mean())
    told = _per_label(targets, predicted, labels)
    for label, threshold in zip(labels, thresholds, strict=True):
        told[label]["threshold"] = float(threshold)
    return Score(metrics, per_label=told)


def chosen_thresholds(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """For every label the threshold (labels,) on its scores (rows, labels) that gives the highest F1 on these rows.

    It lies halfway between two scores, or is 0.5 if that does as well; of several the one nearest to 0.5. A label that
    no row has gets 0.5.
    """
    return np.array([_threshold(scores[:, label], targets[:, label]) for label in range(targets.shape[1])])


def _threshold(scores: np.ndarray, targets: np.ndarray) -> float:
    from sklearn.metrics import precision_recall_curve

    if not targets.any():
        return USUAL_THRESHOLD
    # ``found`` are the scores that occur, rising: precision and recall if those from there on count.
    precision, recall, found = precision_recall_curve(targets, scores.round(_DIGITS))
    f1 = (2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny))[:-1]
    below = np.concatenate([[0.0], found[:-1]])
    between = (below < USUAL_THRESHOLD) & (found > USUAL_THRESHOLD)
    cuts = np.where(between, USUAL_THRESHOLD, (below + found) / 2)
    best = cuts[f1 >= f1.max() - 1e-9]
    return float(best[np.abs(best - USUAL_THRESHOLD).argmin()])


def numbers(predicted: np.ndarray, targets: np.ndarray) -> Score:
    """The score of numbers (rows,) against others; ``loss`` is the mean squared error, ``mae`` the mean absolute one.

    ``pearson`` and ``spearman`` are 0 where they are not defined or say nothing: all predictions are one number, or all
    targets, or there are fewer than three rows.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_absolute_error, mean_squared_error

    predicted = predicted.astype(np.float64)
    return Score(
        {
            "pearson": _correlation(pearsonr, predicted, targets),
            "spearman": _correlation(spearmanr, predicted, targets),
            "mae": float(mean_absolute_error(targets, predicted)),
            "loss": float(mean_squared_error(targets, predicted)),
        }
    )


def _correlation(measure: Callable[..., Any], predicted: np.ndarray, targets: np.ndarray) -> float:
    if len(targets) < 3 or _constant(predicted) or _constant(targets):
        return 0.0
    return float(measure(predicted, targets).statistic)


def _constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= _CONSTANT * np.abs(values).max())


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Without overflow."""
    scores: np.ndarray = np.exp(-np.logaddexp(0, -logits))
    return scores


def _per_label(targets: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of every label; 0 where a share has nothing to divide by."""
    from sklearn.metrics import precision_recall_fscore_support

    ids = list(range(len(labels)))
    found = precision_recall_fscore_support(targets, predicted, labels=ids, zero_division=0)
    names = ("precision", "recall", "f1", "support")
    return {
        label: dict(zip(names, map(float, told), strict=True))
        for label, told in zip(labels, zip(*found, strict=True), strict=True)
    }


@cache
def _metric() -> Any:
    """The metrics as an `evaluate.Metric`; `evaluate.load` would download a script for the same arithmetic."""
    import datasets
    import evaluate
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    class ClassificationMetrics(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> evaluate.MetricInfo:
            label = datasets.Value("int64")
            return evaluate.MetricInfo(
                description="Accuracy, F1 and Matthews' correlation of one label per row.",
                citation="Pedregosa et al., JMLR 12 (2011), scikit-learn",
                inputs_description="predictions and references: label ids",
                features=datasets.Features({"predictions": label, "references": label}),
            )

        def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
            averages = ("macro", "micro", "weighted")
            f1 = {f"f1_{name}": float(f1_score(references, predictions, average=name)) for name in averages}
            # Of rows that all have one label, and get it, scikit-learn warns and gives 0.
            several = len({*predictions, *references}) > 1
            matthews = float(matthews_corrcoef(references, predictions)) if several else 0.0
            return {"accuracy": float(accuracy_score(references, predictions)), **f1, "matthews": matthews}

    # In memory: by default evaluate writes every call's rows to a file in the home folder.
    return ClassificationMetrics(keep_in_memory=True)
