"""Scores of several labels, of numbers and of confidences are scikit-learn's, scipy's and those of the definitions."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn import metrics as sklearn_metrics
from torch.nn import functional

from banjoray.tasks.classification_scores import calibration_error, chosen_thresholds, many_labels, numbers, one_label

LABELS = ("anger", "fear", "joy", "love")


def drawn(seed: int, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Logits and targets of four labels, (rows, 4), that have something to do with each other."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (rows, len(LABELS)))
    noise = generator.normal(0, 2, logits.shape)
    return logits.astype(np.float32), (logits + noise > 1).astype(np.int8)


def probabilities(logits: np.ndarray) -> np.ndarray:
    found: np.ndarray = torch.from_numpy(logits).double().sigmoid().numpy()
    return found


@pytest.mark.parametrize("seed", range(10))
def test_the_score_of_several_labels_is_what_scikit_learn_and_torch_compute(seed: int) -> None:
    logits, targets = drawn(seed, rows=1 + 7 * seed)
    thresholds = np.array([0.2, 0.5, 0.6, 0.9])
    predicted = (probabilities(logits) >= thresholds).astype(int)
    score = many_labels(logits, targets, LABELS, thresholds)
    f1 = {
        f"f1_{average}": sklearn_metrics.f1_score(targets, predicted, average=average, zero_division=0)
        for average in ("macro", "micro", "weighted")
    }
    loss = functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits).double(), torch.from_numpy(targets).double()
    )
    accuracy = (predicted == targets).all(axis=1).mean()
    assert score.metrics == pytest.approx({**f1, "accuracy": accuracy, "loss": loss.item()}, abs=1e-12)
    assert all(type(value) is float for value in score.metrics.values())
    assert score.thresholds == dict(zip(LABELS, thresholds.tolist(), strict=True))
    expected = sklearn_metrics.precision_recall_fscore_support(targets, predicted, zero_division=0)
    for label, told in zip(LABELS, np.stack(expected, axis=1), strict=True):
        found = score.per_label[label]
        assert [found[name] for name in ("precision", "recall", "f1", "support")] == pytest.approx(told.tolist())
    assert score.confusion == ()


def f1_at(scores: np.ndarray, targets: np.ndarray, threshold: float) -> float:
    return float(sklearn_metrics.f1_score(targets, scores >= threshold, zero_division=0))


@pytest.mark.parametrize("seed", range(10))
def test_no_threshold_gives_a_label_a_better_f1_than_the_one_that_is_chosen(seed: int) -> None:
    logits, targets = drawn(seed, rows=40)
    scores = probabilities(logits)
    for label, threshold in enumerate(chosen_thresholds(scores, targets)):
        own, wanted = scores[:, label], targets[:, label]
        best = max(f1_at(own, wanted, other) for other in [0.0, 0.5, *own])
        assert f1_at(own, wanted, threshold) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize(
    ("scores", "targets", "threshold"),
    [
        # No row has it: nothing speaks for another one.
        ([0.1, 0.7, 0.9], [0, 0, 0], 0.5),
        # Every cut between 0.2 and 0.8 is right, so the usual one.
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 0.5),
        # Far from it, halfway.
        ([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], 0.25),
        ([0.6, 0.7, 0.8, 0.9], [0, 0, 0, 1], 0.85),
        # All rows have it.
        ([0.2, 0.4], [1, 1], 0.1),
        # Equal scores can't be told apart, and scores that only rounding tells apart are equal.
        ([0.4, 0.4, 0.2], [1, 0, 0], 0.3),
        ([0.4, 0.4 + 1e-9, 0.2], [1, 0, 0], 0.3),
        # The first alone does as well as the first four (2/3), and its cut is nearer to 0.5.
        ([0.45, 0.4, 0.35, 0.3, 0.1], [1, 0, 0, 1, 0], 0.425),
    ],
)
def test_the_threshold_of_a_label(scores: list[float], targets: list[int], threshold: float) -> None:
    found = chosen_thresholds(np.array(scores)[:, None], np.array(targets)[:, None])
    assert found == pytest.approx([threshold])


def test_without_thresholds_those_that_are_best_for_the_rows_are_chosen_and_told() -> None:
    logits, targets = drawn(3)
    chosen = chosen_thresholds(probabilities(logits), targets)
    score = many_labels(logits, targets, LABELS, None)
    assert list(score.thresholds.values()) == pytest.approx(chosen.tolist())
    assert score == many_labels(logits, targets, LABELS, np.array(list(score.thresholds.values())))
    assert score.metrics["f1_macro"] > many_labels(logits, targets, LABELS, np.full(4, 0.5)).metrics["f1_macro"]


@pytest.mark.parametrize("seed", range(5))
def test_the_score_of_numbers_is_what_scipy_and_scikit_learn_compute(seed: int) -> None:
    generator = np.random.default_rng(seed)
    targets = generator.normal(3, 2, 50)
    predicted = (targets + generator.normal(0, 2, 50)).astype(np.float32)
    found = numbers(predicted, targets).metrics
    assert found == pytest.approx(
        {
            "pearson": scipy.stats.pearsonr(predicted.astype(float), targets).statistic,
            "spearman": scipy.stats.spearmanr(predicted, targets).statistic,
            "mae": np.abs(predicted.astype(float) - targets).mean(),
            "loss": sklearn_metrics.mean_squared_error(targets, predicted.astype(float)),
        },
        abs=1e-12,
    )
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize(
    ("predicted", "targets"),
    [
        ([2.0, 2.0, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0]),
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]),
        # What differs is rounding.
        ([2.0, 2.000001, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0]),
        ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]),
        ([1.0, 2.0], [5.0, 6.0]),
        ([1.0], [5.0]),
    ],
)
def test_a_correlation_that_is_not_defined_is_zero(predicted: list[float], targets: list[float]) -> None:
    found = numbers(np.array(predicted), np.array(targets)).metrics
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)
    assert found["loss"] > 0


def test_the_calibration_error_is_its_definition() -> None:
    generator = np.random.default_rng(4)
    confidences, right = generator.uniform(0.2, 1, 200), generator.integers(0, 2, 200).astype(bool)
    expected = 0.0
    for number in range(15):
        inside = (confidences > number / 15) & (confidences <= (number + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(confidences[inside].mean() - right[inside].mean())
    assert calibration_error(confidences, right) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("confidences", "right", "error"),
    [
        ([1.0, 1.0], [True, True], 0.0),
        ([1.0, 1.0], [False, False], 1.0),
        # Of four answers at 0.75, three are right.
        ([0.75] * 4, [True, True, True, False], 0.0),
        ([0.6, 0.9], [True, False], 0.65),
    ],
)
def test_the_calibration_error_of_answers(confidences: list[float], right: list[bool], error: float) -> None:
    assert calibration_error(np.array(confidences), np.array(right)) == pytest.approx(error)


def test_rows_that_all_have_and_get_one_label_are_scored_without_a_warning() -> None:
    logits: Any = np.array([[3.0, 1.0], [2.0, 1.0], [5.0, 0.0]], dtype=np.float32)
    found = one_label(logits, np.zeros(3, dtype=np.int64), ["a", "b"]).metrics
    assert (found["accuracy"], found["f1_micro"], found["matthews"]) == (1.0, 1.0, 0.0)
