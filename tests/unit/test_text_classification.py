"""Text classification: its score is scikit-learn's and torch's, and what it reads and answers over HTTP."""

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from banjoray.config.job import JobConfig
from banjoray.config.metrics import MINIMISED
from banjoray.data.splits import Split
from banjoray.data.tokens import Tokens
from banjoray.errors import ConfigError, RequestError
from banjoray.tasks import classification_scores
from banjoray.tasks.task import Ask, Score, Seen, check_metrics, task_for
from banjoray.tasks.text_classification import TextClassification

TASK = TextClassification()
LABELS = ("anger", "fear", "joy", "love")


def scored(outputs: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> Score:
    tokens = Tokens({}, np.arange(len(targets) + 1), targets)
    return TASK.score(list(outputs), tokens, Split("test", datasets.Dataset.from_dict({}), {}), labels)


def answered(outputs: np.ndarray, labels: Sequence[str], parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The answer for one row."""
    found: list[dict[str, Any]] = TASK.answer(Ask([{}], parameters), [Seen([], [outputs])], labels, None)[0]
    return found


def logits(seed: int, rows: int, labels: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(0, 4, (rows, labels)).astype(np.float32), generator.integers(0, labels, rows)


def calibration_error(outputs: np.ndarray, targets: np.ndarray) -> float:
    """The mean over 15 bins, weighted by rows, of how far confidence and accuracy are apart."""
    confidences = torch.from_numpy(outputs).double().softmax(1).max(1).values.numpy()
    bins = np.ceil(confidences * 15)
    right = outputs.argmax(1) == targets
    told = [(bins == number).mean() * abs((confidences - right)[bins == number].mean()) for number in np.unique(bins)]
    return float(np.sum(told))


@pytest.mark.parametrize("seed", range(20))
def test_the_score_is_what_scikit_learn_and_torch_compute(seed: int) -> None:
    labels = 2 + seed % 5
    outputs, targets = logits(seed, 1 + 7 * seed, labels)
    predicted = outputs.argmax(1)
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(outputs).double(), torch.from_numpy(targets))
    score = scored(outputs, targets, [f"label {number}" for number in range(labels)])
    assert score.metrics == pytest.approx(
        {
            "accuracy": sklearn_metrics.accuracy_score(targets, predicted),
            "f1_macro": sklearn_metrics.f1_score(targets, predicted, average="macro"),
            "f1_micro": sklearn_metrics.f1_score(targets, predicted, average="micro"),
            "f1_weighted": sklearn_metrics.f1_score(targets, predicted, average="weighted"),
            "matthews": sklearn_metrics.matthews_corrcoef(targets, predicted) if len(targets) > 1 else 0.0,
            "loss": loss.item(),
            "calibration_error": calibration_error(outputs, targets),
        },
        abs=1e-12,
    )
    expected = sklearn_metrics.confusion_matrix(targets, predicted, labels=range(labels))
    assert score.confusion == tuple(map(tuple, expected.tolist()))


def test_the_score_has_exactly_the_metrics_that_the_task_names() -> None:
    score = scored(*logits(1, 30, len(LABELS)), LABELS)
    assert tuple(score.metrics) == TASK.metrics
    assert all(type(value) is float for value in score.metrics.values())


def test_the_confusion_has_true_labels_as_rows_and_answers_as_columns() -> None:
    outputs = np.eye(3, dtype=np.float32)[[0, 1, 1, 2, 0]]
    score = scored(outputs, np.array([0, 0, 0, 2, 2]), ["a", "b", "c"])
    assert score.confusion == ((1, 2, 0), (0, 0, 0), (1, 0, 1))
    assert score.to_json()["confusion"] == [[1, 2, 0], [0, 0, 0], [1, 0, 1]]


def test_a_certain_and_wrong_answer_has_a_finite_loss() -> None:
    score = scored(np.array([[1e4, -1e4]], dtype=np.float32), np.array([1]), ["a", "b"])
    assert score.metrics["loss"] == pytest.approx(2e4)


def test_the_metrics_are_an_evaluate_metric_and_scores_go_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = classification_scores._metric()
    assert isinstance(metric, evaluate.Metric)
    seen: list[Any] = []

    def compute(**given: Any) -> dict[str, float]:
        seen.append(given)
        return {"accuracy": 0.125}

    monkeypatch.setattr(metric, "compute", compute)
    outputs, targets = logits(2, 12, 4)
    assert scored(outputs, targets, LABELS).metrics["accuracy"] == 0.125
    assert seen[0]["references"] is targets
    assert seen[0]["predictions"].tolist() == outputs.argmax(1).tolist()


def test_one_score_leaves_nothing_behind_for_the_next() -> None:
    first = scored(*logits(3, 20, 4), LABELS)
    scored(*logits(4, 50, 4), LABELS)
    assert scored(*logits(3, 20, 4), LABELS) == first


def job_with(**changes: Any) -> JobConfig:
    tree: dict[str, Any] = {"name": "t", "task": "text-classification", "data": {"source": "banjoray:emotion"}}
    return JobConfig.model_validate(tree).with_values({key.replace("__", "."): value for key, value in changes.items()})


def test_a_job_may_ask_for_the_tasks_metrics_only() -> None:
    for metric in TASK.metrics:
        check_metrics(job_with(train={"metric": metric, "mode": "min" if metric in MINIMISED else "max"}))
    with pytest.raises(ConfigError, match=r"^train\.metric: text-classification has no metric 'f1'; it has accuracy, "):
        check_metrics(job_with(train__metric="f1"))
    with pytest.raises(ConfigError, match=r"^registry\.gate\.metric: text-classification has no metric 'bleu'"):
        check_metrics(job_with(registry__gate__metric="bleu"))


def test_the_task_is_found_by_the_name_in_a_job_file() -> None:
    assert isinstance(task_for(job_with().task), TextClassification)


@pytest.mark.parametrize(
    ("inputs", "rows"),
    [
        ("hello", [{"text": "hello"}]),
        (["hello", "there"], [{"text": "hello"}, {"text": "there"}]),
        ({"text": "a"}, [{"text": "a"}]),
        ({"text": "a", "text_pair": "b"}, [{"text": "a", "text_pair": "b"}]),
        ({"text": "a", "text_pair": None}, [{"text": "a"}]),
        ([{"text": "a", "text_pair": "b"}, "c"], [{"text": "a", "text_pair": "b"}, {"text": "c"}]),
        (" kept as it is \n", [{"text": " kept as it is \n"}]),
        ("😀", [{"text": "😀"}]),
    ],
)
def test_every_accepted_shape_becomes_rows(inputs: Any, rows: list[dict[str, str]]) -> None:
    assert TASK.parse(inputs, {}) == Ask(rows, {}, single=not isinstance(inputs, list))


@pytest.mark.parametrize(
    ("inputs", "where"),
    [
        ([], "inputs: an empty list"),
        (None, "inputs: found NoneType"),
        (7, "inputs: found int"),
        (True, "inputs: found bool"),
        ("", "inputs.text: found nothing but blanks"),
        ({}, "inputs: found keys []"),
        ({"txt": "a"}, "inputs: found keys ['txt']"),
        ({"text": "a", "label": "x"}, "inputs: found keys ['label', 'text']"),
        ({"text_pair": "b"}, "inputs: found keys ['text_pair']"),
        (["ok", 7], "inputs[1]: found int"),
        (["ok", None], "inputs[1]: found NoneType"),
        (["ok", ["nested"]], "inputs[1]: found list"),
        (["ok", "ok", " \t\u3000"], "inputs[2].text: found nothing but blanks"),
        ([{"text": "ok"}, {"text": 7}], "inputs[1].text: found int"),
        ([{"text": "ok"}, {"text": None}], "inputs[1].text: found NoneType"),
        ([{"text": "ok", "text_pair": ["b"]}], "inputs[0].text_pair: found list"),
        ([{"text": "ok", "text_pair": ""}], "inputs[0].text_pair: found nothing but blanks"),
        # JSON can spell it, UTF-8 and so the tokenizer can't.
        (["ok", "half \ud83d"], "inputs[1].text: found half a character"),
    ],
)
def test_every_other_shape_is_refused_and_the_row_named(inputs: Any, where: str) -> None:
    with pytest.raises(RequestError) as caught:
        TASK.parse(inputs, {})
    assert str(caught.value).startswith(where)
    assert "needed" in str(caught.value)
    assert caught.value.status == 422


def scores_of(answer: list[dict[str, Any]]) -> list[float]:
    return [entry["score"] for entry in answer]


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_has_every_label_once_by_falling_score_and_the_scores_sum_to_one(seed: int) -> None:
    outputs = logits(seed, 1, 4)[0][0]
    answer = answered(outputs, LABELS, {})
    assert sorted(str(entry["label"]) for entry in answer) == sorted(LABELS)
    assert scores_of(answer) == sorted(scores_of(answer), reverse=True)
    assert sum(scores_of(answer)) == pytest.approx(1, abs=1e-12)
    expected = torch.softmax(torch.from_numpy(outputs).double(), 0)
    assert {entry["label"]: entry["score"] for entry in answer} == pytest.approx(
        dict(zip(LABELS, expected.tolist(), strict=True)), abs=1e-12
    )


def test_equal_scores_keep_the_order_of_labels() -> None:
    assert [entry["label"] for entry in answered(np.zeros(4, dtype=np.float32), LABELS, {})] == list(LABELS)


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (3, 3), (4, 4), (99, 4), (None, 4)])
def test_top_k_keeps_the_best(top_k: int | None, count: int) -> None:
    outputs = logits(7, 1, 4)[0][0]
    assert answered(outputs, LABELS, {"top_k": top_k}) == answered(outputs, LABELS, {})[:count]


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "none", None])
def test_function_to_apply_turns_logits_into_scores(name: str | None) -> None:
    outputs = torch.tensor([-2.0, 3.0, 0.5, 1.0])
    logits = outputs.double()
    expected = {"sigmoid": logits.sigmoid(), "none": logits}.get(str(name), logits.softmax(0))
    answer = answered(outputs.numpy(), LABELS, {"function_to_apply": name})
    assert scores_of(answer) == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-12)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_extreme_logits_give_finite_scores(name: str) -> None:
    answer = answered(np.array([1e4, -1e4, 0, 5], dtype=np.float32), LABELS, {"function_to_apply": name})
    assert all(math.isfinite(score) and 0 <= score <= 1 for score in scores_of(answer))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"top_k": 0}, "parameters.top_k: found 0; needed a whole number >= 1"),
        ({"top_k": -1}, "parameters.top_k: found -1"),
        ({"top_k": True}, "parameters.top_k: found True"),
        ({"top_k": 1.0}, "parameters.top_k: found 1.0"),
        ({"top_k": "all"}, "parameters.top_k: found 'all'"),
        ({"function_to_apply": "relu"}, "parameters.function_to_apply: found 'relu'; needed softmax, sigmoid or none"),
        ({"function_to_apply": ["none"]}, "parameters.function_to_apply: found ['none']"),
        ({"function_to_apply": ""}, "parameters.function_to_apply: found ''"),
        ({"topk": 1, "beam": 2}, "parameters: unknown ['beam', 'topk']; text-classification has top_k, function_to_ap"),
    ],
)
def test_other_parameters_are_refused_by_name(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        answered(np.zeros(4, dtype=np.float32), LABELS, parameters)
    assert str(caught.value).startswith(words)
    assert caught.value.status == 422
