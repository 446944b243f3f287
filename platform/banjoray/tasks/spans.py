"""Pieces of a context as answers: which are the best by a model's logits, and how near one is to what was expected.

Scores and HTTP answers both come from `best_spans`.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from banjoray.data.contexts import NO_ANSWER
from banjoray.tasks.task import log_softmax

# How many pieces of each window are looked at, at least.
N_BEST = 20
# A run of letters and digits, where blanks stand between words: not in Thai, Lao, Burmese, Khmer, Chinese or Japanese.
_IN_WORD = re.compile(r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


@dataclass(frozen=True)
class Window:
    """One window of a row: characters of the context by token, as `contexts` has them, and logits (2, tokens)."""

    starts: np.ndarray
    ends: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Span:
    """An answer: characters [start, end) of the context, both 0 for "no answer", and its probability."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Wanted:
    """Which answers count: of at most ``tokens`` tokens; "no answer" if ``nothing``; made whole words if ``words``."""

    tokens: int
    nothing: bool = False
    words: bool = True


def best_spans(windows: Sequence[Window], context: str, wanted: Wanted, count: int = 1) -> list[Span]:
    """At most ``count`` answers, the likeliest first, each piece of the context once; never none.

    The probability is that of the first token times that of the last, each a softmax over the context and the token for
    "no answer" in a window; "no answer" has the lowest of its probabilities in all windows. This is what the
    question-answering pipeline of transformers 4 gave. Where no token can be part of an answer, it is "no answer".
    """
    found: dict[tuple[int, int], float] = {}
    nothing = 0.0
    for window in windows:
        log_probabilities = _log_probabilities(window)
        mark = int(np.flatnonzero(window.starts == NO_ANSWER)[0])
        nothing = min(nothing, float(log_probabilities[:, mark].sum()))
        for start, end, score in _likeliest(window, log_probabilities, wanted.tokens, max(count, N_BEST)):
            piece = _whole_words(context, start, end) if wanted.words else (start, end)
            found[piece] = max(score, found.get(piece, -np.inf))
    if wanted.nothing or not found:
        found[0, 0] = nothing
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return [Span(start, end, float(np.exp(score))) for (start, end), score in ranked[:count]]


def _log_probabilities(window: Window) -> np.ndarray:
    """Of every token to be the first, and the last, of the answer, (2, tokens); -inf for the question's."""
    counts = (window.starts >= 0) | (window.starts == NO_ANSWER)
    return log_softmax(np.where(counts, window.logits.astype(np.float64), -np.inf))


def _likeliest(window: Window, log_probabilities: np.ndarray, longest: int, count: int) -> list[tuple[int, int, float]]:
    """The best pieces of one window: first and last character, log probability."""
    inside = window.starts >= 0
    first, last = np.where(inside, log_probabilities, -np.inf)
    width = min(longest, len(first))
    # Row i, column j: from token i to token i + j.
    ends = np.lib.stride_tricks.sliding_window_view(np.append(last, np.full(width - 1, -np.inf)), width)
    scores = (first[:, None] + ends).ravel()
    best = np.argpartition(-scores, min(count, len(scores)) - 1)[:count]
    return [
        (int(window.starts[number // width]), int(window.ends[number // width + number % width]), float(scores[number]))
        for number in best
        if np.isfinite(scores[number])
    ]


def _whole_words(context: str, start: int, end: int) -> tuple[int, int]:
    """The piece with the rest of the words that it begins and ends in."""
    while start > 0 and _IN_WORD.match(context, start) and _IN_WORD.match(context, start - 1):
        start -= 1
    while end < len(context) and _IN_WORD.match(context, end) and _IN_WORD.match(context, end - 1):
        end += 1
    return start, end


def normalised(text: str) -> str:
    """A text as SQuAD compares it: lower case, without punctuation (ASCII's), articles and repeated blanks."""
    letters = "".join(letter for letter in text.lower() if letter not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", letters).split())


def exact_match(answer: str, expected: Sequence[str]) -> float:
    """1 if the answer equals one of the expected ones but for what `normalised` drops, else 0; none expected: ""."""
    return max(float(normalised(answer) == normalised(other)) for other in _worded(expected))


def f1(answer: str, expected: Sequence[str]) -> float:
    """The words that the answer shares with an expected one, as F1 in 0..1; of the nearest. None expected: ""."""
    return max(_f1(normalised(answer).split(), normalised(other).split()) for other in _worded(expected))


def _worded(expected: Sequence[str]) -> Sequence[str]:
    """The expected answers that have words, as SQuAD 2.0's script takes them."""
    return [text for text in expected if normalised(text)] or [""]


def _f1(answer: Sequence[str], expected: Sequence[str]) -> float:
    if not answer or not expected:
        return float(answer == expected)
    shared = sum((Counter(answer) & Counter(expected)).values())
    return 2 * shared / (len(answer) + len(expected))
