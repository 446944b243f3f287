"""How high texts rank what belongs to them, among all that belongs to others."""

import math

import numpy as np

from banjoray.tasks.task import log_softmax

# So many pairs are compared with each other at most: a larger split is cut into equal parts, each ranked by itself.
CANDIDATES = 10_000
# First texts whose similarities are computed at once; bounds memory to CHUNK x CANDIDATES numbers.
CHUNK = 512
# Who comes so close to the own text counts as before it: rounding must not decide, nor a model be praised that gives
# every text the same vector.
TIE = 1e-6


def rank_pairs(vectors: np.ndarray, texts: np.ndarray, scale: float) -> dict[str, float]:
    """mrr, recall_at_1 and loss (nats) of pairs: each first text looks for its own among the second texts.

    ``vectors`` (pairs, 2, width) have length 1; ``texts`` (pairs, 2) have equal numbers where texts are equal. A second
    text counts once however many pairs have it, and what else belongs to an equal first text is left out. mrr is the
    mean of 1 / rank, recall_at_1 the share of rank 1, loss the cross-entropy of ``scale`` times the cosines.
    """
    parts = np.array_split(np.arange(len(texts)), math.ceil(len(texts) / CANDIDATES))
    found = [_ranked(vectors[part], texts[part], scale) for part in parts]
    ranks, losses = (np.concatenate(side) for side in zip(*found, strict=True))
    return {"mrr": float((1 / ranks).mean()), "recall_at_1": float((ranks == 1).mean()), "loss": float(losses.mean())}


def _ranked(vectors: np.ndarray, texts: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The rank, from 1, and the loss of every pair among some pairs."""
    _, once, columns = np.unique(texts[:, 1], return_index=True, return_inverse=True)
    belongs = _belongs(texts[:, 0], columns)
    ranks, losses = np.empty(len(texts), np.int64), np.empty(len(texts))
    for start in range(0, len(texts), CHUNK):
        pairs = np.arange(start, min(start + CHUNK, len(texts)))
        cosines = vectors[pairs, 0] @ vectors[once, 1].T
        numbers = pairs - start
        own = cosines[numbers, columns[pairs]]
        for number, pair in enumerate(pairs):
            cosines[number, belongs.get(int(texts[pair, 0]), [])] = -np.inf
        cosines[numbers, columns[pairs]] = own
        ranks[pairs] = (cosines > own[:, None] - TIE).sum(axis=1)
        losses[pairs] = -log_softmax(scale * cosines.astype(np.float64))[numbers, columns[pairs]]
    return ranks, losses


def _belongs(firsts: np.ndarray, columns: np.ndarray) -> dict[int, list[int]]:
    """Of first texts that several pairs have, all second texts that belong to them."""
    found: dict[int, list[int]] = {}
    for first, column in zip(firsts.tolist(), columns.tolist(), strict=True):
        found.setdefault(first, []).append(column)
    return {first: seconds for first, seconds in found.items() if len(seconds) > 1}
