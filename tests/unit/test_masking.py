"""Which tokens are hidden: how many, behind what, and that only the seed, the epoch and the row decide."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from banjoray.config.train import MaskingConfig
from banjoray.data.tokens import IGNORED
from banjoray.tasks.masking import Masks, how_many, ordinary_ids, special_ids
from masked import pieces_tokenizer

MASK, WORDS = 4, np.arange(5, 1000)


def masks(share: float = 0.15, whole_words: bool = False, seed: int = 3) -> Masks:
    return Masks(MaskingConfig(share=share, whole_words=whole_words), seed, MASK, WORDS)


def features(count: int, most: int = 60, longest_word: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, the word of each token) of some features, special tokens at both ends and some inside."""
    generator = np.random.default_rng(11)
    found = []
    for _ in range(count):
        size = int(generator.integers(1, most))
        sizes = generator.integers(1, longest_word + 1, size)
        words = np.repeat(np.arange(size), sizes)[:size]
        words[generator.random(size) < 0.05] = IGNORED
        ids = np.where(words == IGNORED, 1, generator.choice(WORDS, size))
        found.append((np.array([2, *ids, 3]), np.array([IGNORED, *words, IGNORED])))
    return found


def drawn(
    collate: Masks, rows: list[tuple[np.ndarray, np.ndarray]], numbers: list[int], epoch: int | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, targets) of the features with these numbers, as one padded batch gave them."""
    lengths = [len(rows[number][0]) for number in numbers]
    ids, words = np.zeros((len(numbers), max(lengths)), np.int64), np.full((len(numbers), max(lengths)), IGNORED)
    for place, number in enumerate(numbers):
        ids[place, : lengths[place]], words[place, : lengths[place]] = rows[number]
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}
    hidden, targets = collate(inputs, words, np.array(numbers), epoch)
    assert hidden["attention_mask"] is inputs["attention_mask"]
    for place, length in enumerate(lengths):
        assert (hidden["input_ids"][place, length:] == 0).all()
        assert (targets[place, length:] == IGNORED).all()
    parts = zip(hidden["input_ids"], targets, lengths, strict=True)
    return [(found[:length], wanted[:length]) for found, wanted, length in parts]


@pytest.mark.parametrize("share", [0.01, 0.15, 0.4, 0.99])
def test_how_many_are_hidden_is_what_bert_hides_and_a_function_of_the_length(share: float) -> None:
    lengths = np.arange(600)
    expected = [max(1, round(share * length)) if length else 0 for length in lengths.tolist()]
    assert how_many(lengths, share).tolist() == expected
    assert (how_many(lengths, share) <= lengths).all()


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("share", [0.15, 0.5])
def test_so_many_are_hidden_in_every_epoch_and_never_a_special_one(share: float, whole_words: bool) -> None:
    rows = features(80, longest_word=5)
    collate = masks(share, whole_words)
    for epoch in (None, 0, 1, 7):
        for (ids, words), (hidden, targets) in zip(rows, drawn(collate, rows, list(range(80)), epoch), strict=True):
            known = targets != IGNORED
            assert known.sum() == how_many(np.array((words != IGNORED).sum()), share)
            assert (words[known] != IGNORED).all()
            assert (targets[known] == ids[known]).all()
            assert (hidden[~known] == ids[~known]).all()


def test_a_feature_without_a_word_is_left_as_it_is() -> None:
    rows = [(np.array([2, 3]), np.array([IGNORED, IGNORED])), *features(1)]
    for whole_words in (False, True):
        hidden, targets = drawn(masks(whole_words=whole_words), rows, [0, 1], 0)[0]
        assert hidden.tolist() == [2, 3]
        assert (targets == IGNORED).all()


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_drawing_is_of_the_seed_the_epoch_and_the_number_and_not_of_the_batch(whole_words: bool) -> None:
    rows = features(20, longest_word=3)
    collate = masks(whole_words=whole_words)
    together = drawn(collate, rows, list(range(20)), 2)
    alone = [drawn(collate, rows, [number], 2)[0] for number in range(20)]
    mixed = dict(zip((7, 3, 19, 0), drawn(masks(whole_words=whole_words), rows, [7, 3, 19, 0], 2), strict=True))
    for number in range(20):
        for other in (alone[number], mixed.get(number, alone[number])):
            assert np.array_equal(other[0], together[number][0])
            assert np.array_equal(other[1], together[number][1])


def test_another_epoch_seed_or_number_is_another_drawing_and_evaluation_is_always_the_same() -> None:
    row = (np.array([2, *range(5, 65), 3]), np.array([IGNORED, *range(60), IGNORED]))
    rows = [row, row]

    def told(number: int, epoch: int | None, seed: int = 3) -> bytes:
        found: bytes = drawn(masks(seed=seed), rows, [number], epoch)[0][1].tobytes()
        return found

    training = [told(number, epoch, seed) for number in (0, 1) for epoch in (0, 1, 2) for seed in (3, 4)]
    evaluation = [told(0, None), told(1, None)]
    assert len({*training, *evaluation}) == len(training) + len(evaluation)
    assert told(0, None, seed=99) == evaluation[0]


def test_four_fifths_stand_behind_the_mask_a_tenth_behind_any_word_and_a_tenth_stay() -> None:
    length, count = 200, 400
    rows = [(np.arange(5, 5 + length), np.arange(length))] * count
    found = drawn(masks(0.5), rows, list(range(count)), 0)
    hidden, targets = np.stack([one[0] for one in found]), np.stack([one[1] for one in found])
    known = targets != IGNORED
    masked, kept = (hidden == MASK)[known], (hidden == targets)[known]
    # 40,000 draws: five standard deviations of a share of 0.8 are 0.01.
    assert masked.mean() == pytest.approx(0.8, abs=0.01)
    assert kept.mean() == pytest.approx(0.1, abs=0.01)
    others = hidden[known][~masked & ~kept]
    assert np.isin(others, WORDS).all()
    assert len(np.unique(others)) > 0.9 * len(WORDS)
    # Every place is chosen as often as any other: 200 of 400 times, five standard deviations are 50.
    assert known.sum(0) == pytest.approx(np.full(length, 200), abs=50)


def test_whole_words_are_hidden_whole_and_one_at_most_is_cut() -> None:
    rows = features(200, longest_word=5)
    cut = 0
    for (_, words), (_, targets) in zip(rows, drawn(masks(0.3, True), rows, list(range(200)), 0), strict=True):
        known, chosen = targets != IGNORED, np.unique(words[targets != IGNORED])
        broken = [word for word in chosen if not known[words == word].all()]
        assert len(broken) <= 1
        for word in broken:
            cut += 1
            # The first of its tokens, and only because no word that is left would have fitted.
            part = known[words == word]
            assert part[: part.sum()].all()
            left = [(words == other).sum() for other in np.unique(words[words != IGNORED]) if other not in chosen]
            assert all(size > part.sum() for size in left)
    assert 0 < cut < 50


def test_whole_words_are_chosen_as_often_as_they_are_long_or_short() -> None:
    words = np.repeat(np.arange(20), [1, 2] * 10)
    rows = [(np.arange(5, 35), words)] * 500
    found = drawn(masks(0.4, True), rows, list(range(500)), 0)
    often = np.array(
        [np.mean([(targets[words == word] != IGNORED).all() for _, targets in found]) for word in range(20)]
    )
    assert often == pytest.approx(np.full(20, 0.4), abs=0.11)


class Tokenizer:
    """As much of one as tells special tokens from others; ``odd`` is special and in no list of names."""

    all_special_ids = (0, 1)

    def __init__(self) -> None:
        self.added_tokens_decoder = {number: SimpleNamespace(special=number < 7) for number in (0, 6, 7)}

    def get_vocab(self) -> dict[str, int]:
        return {"pad": 0, "unk": 1, "a": 2, "b": 3, "odd": 6, "name": 7, "c": 9, "beyond": 12}


def test_words_that_stand_in_for_others_are_ordinary_ones_that_the_table_has() -> None:
    assert special_ids(Tokenizer()) == {0, 1, 6}
    assert ordinary_ids(Tokenizer(), 10).tolist() == [2, 3, 7, 9]
    real: Any = pieces_tokenizer()
    assert special_ids(real) == {0, 1, 2, 3, 4}
    assert ordinary_ids(real, len(real)).tolist() == list(range(5, len(real)))
