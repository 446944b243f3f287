"""How much each searched key mattered: shares of the score's variance, from the trials of a study alone."""

import math
import random
from typing import Any

import pytest

from banjoray.tuning.importance import importances
from banjoray.tuning.study import Trial


def trial(score: float | None, **values: Any) -> Trial:
    return Trial("any", values, "done", 1, 1.0, score)


def drawn(count: int = 24) -> list[Trial]:
    """Trials whose score follows the learning rate's logarithm; dropout and freezing do nothing."""
    draw = random.Random(7)
    trials = []
    for _ in range(count):
        rate = 10 ** draw.uniform(-5, -3)
        freeze = draw.choice(["none", {"layers": 2}, "backbone"])
        trials.append(trial(math.log10(rate), rate=rate, dropout=draw.uniform(0, 0.5), freeze=freeze))
    return trials


def test_a_key_that_decides_the_score_gets_nearly_all_of_it() -> None:
    shares = importances(drawn(), "max")
    assert set(shares) == {"rate", "dropout", "freeze"}
    assert shares["rate"] > 0.9


def test_shares_fall_and_sum_to_1() -> None:
    shares = list(importances(drawn(), "max").values())
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)


def test_small_values_of_a_log_scale_count_as_much_as_large_ones() -> None:
    # The score changes below 1e-4, in the lowest tenth of the even scale, and with the other key by as much.
    trials = [
        trial((rate < 1e-4) + 1.0 * half, rate=rate, half=half)
        for rate in (1e-5, 2e-5, 5e-5, 2e-4, 5e-4, 1e-3)
        for half in (False, True)
    ]
    shares = importances(trials, "max")
    assert shares["rate"] == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(
    "choices",
    [["none", "backbone"], [None, {"type": "lora", "r": 8}], [True, False], [8, 32], [["a.*"], ["b.*"]], [1, True]],
    ids=str,
)
def test_a_choice_of_any_kind_can_matter(choices: list[Any]) -> None:
    trials = [
        trial(float(place), key=choice, other=float(number))
        for number in range(6)
        for place, choice in enumerate(choices)
    ]
    shares = importances(trials, "max")
    assert shares["key"] > 0.9


def test_a_key_of_many_choices_is_told_at_once() -> None:
    # One column for each choice would need 2**40 points.
    trials = [trial(float(seed % 2), seed=seed, rate=0.1 * (seed // 2)) for seed in range(40)]
    assert set(importances(trials, "max")) == {"seed", "rate"}


def test_a_key_with_one_value_has_0_and_comes_last() -> None:
    trials = [trial(float(number), same=1e-4, rate=float(number)) for number in range(6)]
    assert list(importances(trials, "max").items()) == [("rate", 1.0), ("same", 0.0)]


def test_what_can_not_be_told_is_empty() -> None:
    rising = [trial(float(number), rate=float(number)) for number in range(4)]
    assert importances(rising, "max") != {}
    assert importances([], "max") == {}
    assert importances(rising[:3], "max") == {}
    assert importances([trial(0.5, rate=float(number)) for number in range(9)], "max") == {}
    assert importances([trial(float(number), rate=0.1) for number in range(9)], "max") == {}


def test_trials_without_a_score_do_not_count() -> None:
    failed = [trial(None, rate=9.0), trial(math.nan, rate=9.0)]
    assert importances([*drawn(), *failed], "max") == importances(drawn(), "max")
    assert importances([*drawn(3), *failed], "max") == {}


def test_scores_that_differ_little_are_told_as_well() -> None:
    near = [trial(0.5 + one.score * 1e-9, **one.values) for one in drawn() if one.score is not None]
    assert importances(near, "min")["rate"] > 0.9


def test_a_study_is_told_the_same_way_again() -> None:
    assert importances(drawn(), "max", seed=3) == importances(drawn(), "max", seed=3)
    assert importances(drawn(), "max", seed=3) != importances(drawn(), "max", seed=4)


def test_optuna_says_nothing_and_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    importances(drawn(), "max")
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")
