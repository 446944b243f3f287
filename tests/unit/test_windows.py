"""Windows over long texts: they lie as the tokenizers' own do, and each word is read where it has most context."""

from itertools import pairwise

import numpy as np
import pytest

from banjoray.data.windows import pieces_of, windows
from tagged import KINDS, sentences, tokenizer_of


def contexts(words: list[int], room: int, stride: int, first: int, last: int) -> dict[int, float]:
    """Start of a window -> how much context the tokens ``[first, last]`` have in it, of those that hold them whole."""
    starts = range(0, max(1, len(words) - stride), room - stride)
    found = {}
    for start in starts:
        end = min(start + room, len(words))
        if start <= first and last < end:
            before = float("inf") if start == 0 else first - start
            after = float("inf") if end == len(words) else end - 1 - last
            found[start] = min(before, after)
    return found


@pytest.mark.parametrize("seed", range(200))
def test_every_token_is_read_once_and_every_word_where_it_has_most_context(seed: int) -> None:
    generator = np.random.default_rng(seed)
    room = int(generator.integers(2, 20))
    stride = int(generator.integers(0, room))
    sizes = generator.integers(1, generator.integers(2, 9), size=generator.integers(1, 40))
    words = np.repeat(np.arange(len(sizes)), sizes).tolist()
    found = windows(words, room, stride)
    assert [token for window in found for token in range(window.first, window.last)] == list(range(len(words)))
    assert all(
        window.start <= window.first <= window.last <= window.end for window in found if window.first < window.last
    )
    assert all(window.end - window.start <= room for window in found)
    assert all(left.end - right.start == stride for left, right in pairwise(found))
    reader = {token: window.start for window in found for token in range(window.first, window.last)}
    for word in set(words):
        first, last = words.index(word), len(words) - 1 - words[::-1].index(word)
        known = contexts(words, room, stride, first, last)
        if known:
            best = min(start for start, context in known.items() if context == max(known.values()))
            assert {reader[token] for token in range(first, last + 1)} == {best}


def test_without_words_a_token_goes_to_the_window_with_more_around_it_and_to_the_first_of_equals() -> None:
    assert windows([None] * 10, 6, 2) == [(0, 6, 0, 5), (4, 10, 5, 10)]
    assert windows([None] * 9, 5, 1) == [(0, 5, 0, 5), (4, 9, 5, 9)]
    assert windows([None] * 6, 6, 2) == [(0, 6, 0, 6)]
    assert windows([], 6, 2) == [(0, 0, 0, 0)]


@pytest.mark.parametrize("architecture", ["bert", "roberta", "albert"])
def test_windows_are_those_of_the_tokenizers_overflow(architecture: str) -> None:
    tokenizer = tokenizer_of(architecture)
    text = " ".join(word for row in sentences(6) for word in row["tokens"])
    for room, stride in ((8, 0), (8, 5), (13, 4), (500, 10)):
        own = tokenizer(text, truncation=True, max_length=room + 2, stride=stride, return_overflowing_tokens=True)
        [pieces] = pieces_of([text], tokenizer)
        parts = [pieces.part(window) for window in windows(pieces.words, room, stride)]
        for name in tokenizer.model_input_names[:-1]:
            assert [part[name] for part in parts] == own[name]


@pytest.mark.parametrize("architecture", KINDS)
def test_the_special_tokens_of_a_text_stand_apart_and_those_that_are_written_in_it_do_not(architecture: str) -> None:
    tokenizer = tokenizer_of(architecture)
    plain, written, empty = pieces_of(["Ada meets Bo", "Ada <sep> Bo", " "], tokenizer)
    assert (plain.head, plain.tail, written.head, written.tail) == (1, 1, 1, 1)
    assert len(plain.offsets) == len(plain.words) == len(plain.inputs["input_ids"]) - 2
    assert any("Ada <sep> Bo"[start:end].strip() == "<sep>" for start, end in written.offsets)
    assert len(empty.inputs["input_ids"]) == empty.head + empty.tail + len(empty.offsets)
    assert empty.part(windows(empty.words, 4, 1)[0])["input_ids"] == list(empty.inputs["input_ids"])
