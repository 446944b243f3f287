"""How much each searched key mattered for the score of a study."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from banjoray.tuning.study import Trial

# Fewer scores than that tell nothing.
LEAST_SCORES = 4


def importances(trials: Sequence[Trial], mode: str, seed: int = 0) -> dict[str, float]:
    """Share of the score's variance by key, falling; the shares sum to 1, and a key with one value has 0.

    By fANOVA (Hutter et al. 2014, proceedings.mlr.press/v32/hutter14.html) as Optuna computes it, over the values that
    were tried. Empty with fewer than four scores, with scores that are all equal, and where no key has two values.
    """
    scored = [trial for trial in trials if trial.score is not None and math.isfinite(trial.score)]
    scores = [trial.score or 0.0 for trial in scored]
    keys = dict.fromkeys(key for trial in scored for key in trial.values)
    columns = {key: _column([trial.values.get(key) for trial in scored]) for key in keys}
    varied = {key: column for key, column in columns.items() if len(set(column.numbers)) > 1}
    if len(scored) < LEAST_SCORES or len(set(scores)) == 1 or not varied:
        return {}
    return _fanova(varied, _spread(scores), mode, seed) | {key: 0.0 for key in columns if key not in varied}


def logarithmic(numbers: Sequence[float]) -> bool:
    """Whether a log scale shows them best: all above 0, and the highest ten times the lowest or more."""
    return min(numbers) > 0 and max(numbers) / min(numbers) >= 10


def in_order(values: Sequence[Any]) -> list[Any]:
    """Each value once: numbers by size, then others by their JSON text."""
    return [json.loads(text) for text in sorted({json.dumps(value) for value in values}, key=_place)]


def _place(text: str) -> tuple[bool, float, str]:
    value = json.loads(text)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return not number, value if number else 0.0, text


@dataclass(frozen=True)
class _Column:
    """The values of one key as numbers, a trial each, and the range that they stand for."""

    numbers: list[float]
    low: float
    high: float


def _column(values: Sequence[Any]) -> _Column:
    """Floats as they are, or their logarithms; of choices the place, in a range that gives each the same weight.

    The logarithm is taken here: Optuna's fANOVA does not look at a distribution's own log (5.0, transform_log=False).
    Its CategoricalDistribution makes a column per choice and goes through 2**choices points for every tree.
    """
    if all(isinstance(value, float) for value in values):
        numbers = [math.log(value) for value in values] if logarithmic(values) else list(values)
        return _Column(numbers, min(numbers), max(numbers))
    places = {json.dumps(value): float(place) for place, value in enumerate(in_order(values))}
    return _Column([places[json.dumps(value)] for value in values], -0.5, len(places) - 0.5)


def _spread(scores: Sequence[float]) -> list[float]:
    # From 0 to 1: scikit-learn's trees do not split where the variance is below 2e-16, and losses can be as close.
    low, high = min(scores), max(scores)
    return [(score - low) / (high - low) for score in scores]


def _fanova(columns: Mapping[str, _Column], scores: Sequence[float], mode: str, seed: int) -> dict[str, float]:
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    ranges: dict[str, BaseDistribution] = {
        key: FloatDistribution(column.low, column.high) for key, column in columns.items()
    }
    with _quiet():
        study = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
        for number, score in enumerate(scores):
            values = {key: column.numbers[number] for key, column in columns.items()}
            study.add_trial(optuna.trial.create_trial(params=values, distributions=ranges, value=score))
        return dict(get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=seed)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna tells of every study it makes; inside it does not."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
