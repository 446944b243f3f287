"""How high a text ranks its pair: scikit-learn's arithmetic, with equal texts and ties counted fairly."""

import math

import numpy as np
import pytest
import sklearn.metrics
import torch

from banjoray.tasks import ranking
from banjoray.tasks.embeddings import Embeddings
from banjoray.tasks.ranking import rank_pairs


def vectors_of(seed: int, count: int) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(count, 2, 8))
    found[:, 1] += found[:, 0]
    unit: np.ndarray = found / np.linalg.norm(found, axis=-1, keepdims=True)
    return unit


def distinct(count: int) -> np.ndarray:
    return np.column_stack([np.arange(count)] * 2)


@pytest.mark.parametrize("count", [2, 3, 40, 1100])
def test_ranks_are_those_of_scikit_learn(count: int) -> None:
    vectors = vectors_of(count, count)
    cosines = vectors[:, 0] @ vectors[:, 1].T
    logits = torch.from_numpy(20 * cosines)
    own = np.arange(count)
    expected = {
        "mrr": sklearn.metrics.label_ranking_average_precision_score(np.eye(count), cosines),
        "recall_at_1": (cosines.argmax(axis=1) == own).mean(),
        "loss": torch.nn.functional.cross_entropy(logits, torch.arange(count)).item(),
    }
    found = rank_pairs(vectors, distinct(count), 20)
    assert tuple(found) == Embeddings.metrics
    assert found == pytest.approx(expected, abs=1e-9)


def test_equal_texts_count_once_and_what_belongs_too_is_no_rival() -> None:
    vectors = vectors_of(7, 30)
    texts = distinct(30)
    vectors[3, 1], texts[3, 1] = vectors[2, 1], 2
    vectors[5, 0], texts[5, 0] = vectors[4, 0], 4
    cosines = vectors[:, 0] @ vectors[:, 1].T
    ranks = []
    for pair in range(30):
        belongs = {
            other for other in range(30) if texts[other, 0] == texts[pair, 0] or texts[other, 1] == texts[pair, 1]
        }
        rivals = {texts[other, 1]: cosines[pair, other] for other in set(range(30)) - belongs}
        ranks.append(1 + sum(rival > cosines[pair, pair] for rival in rivals.values()))
    found = rank_pairs(vectors, texts, 20)
    assert found["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert found["recall_at_1"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))


def test_a_model_that_gives_one_vector_to_all_texts_ranks_last() -> None:
    one = np.broadcast_to(vectors_of(1, 1)[:, :1], (20, 2, 8)) + np.random.default_rng(0).normal(0, 1e-8, (20, 2, 8))
    found = rank_pairs(one, distinct(20), 20)
    assert found == pytest.approx({"mrr": 1 / 20, "recall_at_1": 0, "loss": math.log(20)}, abs=1e-5)


def test_more_pairs_than_can_be_compared_are_ranked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = vectors_of(9, 50)
    monkeypatch.setattr(ranking, "CANDIDATES", 25)
    halves = [rank_pairs(part, distinct(25), 20) for part in (vectors[:25], vectors[25:])]
    found = rank_pairs(vectors, distinct(50), 20)
    assert found == pytest.approx({name: np.mean([half[name] for half in halves]) for name in Embeddings.metrics})
    monkeypatch.setattr(ranking, "CANDIDATES", 50)
    assert rank_pairs(vectors, distinct(50), 20)["mrr"] < found["mrr"]
