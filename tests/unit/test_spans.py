"""The best pieces of a context by logits, against a search over all of them; and SQuAD's measures of an answer."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from torchmetrics.functional.text import squad

from banjoray.data.contexts import NO_ANSWER, NO_PART
from banjoray.tasks.spans import Span, Wanted, Window, best_spans, exact_match, f1, normalised

CONTEXT = "alpha beta gamma delta epsilon zeta eta theta"
WORDS = [found.span() for found in re.finditer(r"\w+", CONTEXT)]


def window(words: Sequence[int], generator: np.random.Generator, scale: float = 3.0) -> Window:
    """[CLS] question [SEP] some words of the context [SEP], with drawn logits."""
    starts = [NO_ANSWER, NO_PART, NO_PART, *(WORDS[word][0] for word in words), NO_PART]
    ends = [NO_PART, NO_PART, NO_PART, *(WORDS[word][1] for word in words), NO_PART]
    logits = generator.normal(0, scale, (2, len(starts))).astype(np.float32)
    return Window(np.array(starts), np.array(ends), logits)


def searched(windows: Sequence[Window], longest: int) -> tuple[dict[tuple[int, int], float], float]:
    """Every piece with its probability, and that of "no answer", by transformers 4's rule and plain loops."""
    pieces: dict[tuple[int, int], float] = {}
    nothing = []
    for seen in windows:
        inside = [token for token in range(len(seen.starts)) if seen.starts[token] >= 0]
        counted = [0, *inside]
        powers = np.exp(seen.logits[:, counted].astype(np.float64))
        first, last = (dict(zip(counted, row / row.sum(), strict=True)) for row in powers)
        nothing.append(first[0] * last[0])
        for start, end in itertools.product(inside, inside):
            if start <= end < start + longest:
                piece = (int(seen.starts[start]), int(seen.ends[end]))
                pieces[piece] = max(pieces.get(piece, 0.0), first[start] * last[end])
    return pieces, min(nothing)


@pytest.mark.parametrize("seed", range(30))
def test_the_best_pieces_are_those_of_a_search_over_all(seed: int) -> None:
    generator = np.random.default_rng(seed)
    windows = (
        [window(range(8), generator)] if seed % 2 else [window(range(5), generator), window(range(3, 8), generator)]
    )
    longest, count = 1 + seed % 4, 1 + seed % 7
    pieces, nothing = searched(windows, longest)
    ranked = sorted(pieces.items(), key=lambda item: -item[1])
    found = best_spans(windows, CONTEXT, Wanted(longest), count)
    assert [(span.start, span.end) for span in found] == [piece for piece, _ in ranked[:count]]
    assert [span.score for span in found] == pytest.approx([score for _, score in ranked[:count]], abs=1e-12)
    ranked = sorted([*ranked, ((0, 0), nothing)], key=lambda item: -item[1])
    found = best_spans(windows, CONTEXT, Wanted(longest, nothing=True), 100)
    assert [(span.start, span.end) for span in found] == [piece for piece, _ in ranked]
    assert all(0 <= span.score <= 1 for span in found)


def test_all_answers_of_one_window_and_none_are_probabilities_of_all_pairs() -> None:
    seen = window(range(8), np.random.default_rng(1))
    log = seen.logits[:, [0, *range(3, 11)]].astype(np.float64)
    shares = np.exp(log) / np.exp(log).sum(1, keepdims=True)
    in_order = np.triu(np.outer(shares[0][1:], shares[1][1:])).sum() + shares[0][0] * shares[1][0]
    found = best_spans([seen], CONTEXT, Wanted(99, nothing=True), 99)
    assert len(found) == 8 * 9 / 2 + 1
    assert sum(span.score for span in found) == pytest.approx(in_order, abs=1e-12)


def test_logits_of_the_question_never_count() -> None:
    generator = np.random.default_rng(2)
    seen = window(range(8), generator)
    loud = seen.logits.copy()
    loud[:, [1, 2, -1]] = 1e4
    assert best_spans([Window(seen.starts, seen.ends, loud)], CONTEXT, Wanted(15), 9) == (
        best_spans([seen], CONTEXT, Wanted(15), 9)
    )


def test_a_certain_model_gives_finite_scores() -> None:
    seen = window(range(8), np.random.default_rng(3), scale=3e4)
    found = best_spans([seen], CONTEXT, Wanted(15, nothing=True), 99)
    assert all(0 <= span.score <= 1 for span in found)
    assert found == sorted(found, key=lambda span: -span.score)


def test_a_context_without_any_token_has_no_answer() -> None:
    seen = Window(np.array([NO_ANSWER, NO_PART]), np.array([NO_PART, NO_PART]), np.zeros((2, 2), np.float32))
    assert best_spans([seen], "\u200b", Wanted(15)) == [Span(0, 0, 1.0)]


def marked(context: str, start: int, end: int, words: bool = True) -> str:
    """The answer where the model has chosen characters [start, end)."""
    starts, ends = np.array([NO_ANSWER, start]), np.array([NO_PART, end])
    best = best_spans([Window(starts, ends, np.zeros((2, 2), np.float32))], context, Wanted(15, words=words))[0]
    return context[best.start : best.end]


@pytest.mark.parametrize(
    ("context", "piece", "answer"),
    [
        ("They met in Strasbourg.", "as", "Strasbourg"),
        ("They met in Strasbourg.", "met in Stras", "met in Strasbourg"),
        ("They met in Strasbourg.", "Strasbourg", "Strasbourg"),
        ("They met in Strasbourg.", "Strasbourg.", "Strasbourg."),
        ("in 1911-12", "19", "1911"),
        ("the café's door", "caf", "café"),
        ("東京は日本の首都です", "日本", "日本"),
        ("กรุงเทพมหานคร", "เทพ", "เทพ"),
        ("Токио большой", "Ток", "Токио"),
        ("(Aar)", "Aar", "Aar"),
    ],
)
def test_answers_are_whole_words_where_blanks_stand_between_words(context: str, piece: str, answer: str) -> None:
    start = context.index(piece)
    assert marked(context, start, start + len(piece)) == answer
    assert marked(context, start, start + len(piece), words=False) == piece


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Alps.", "alps"),
        ("a cat, an owl and the dog", "cat owl and dog"),
        ("Theatre of Anna", "theatre of anna"),
        ("U.S.", "us"),
        ("$5-million", "5million"),
        ("the", ""),
        ("\tA\nB ", "b"),
        ("“Zürich”", "“zürich”"),
    ],
)
def test_texts_are_compared_without_case_punctuation_and_articles(text: str, plain: str) -> None:
    assert normalised(text) == plain


@pytest.mark.parametrize(
    ("answer", "expected", "exact", "overlap"),
    [
        ("the Alps", ["Alps"], 1, 1),
        ("in the Alps", ["Alps"], 0, 2 / 3),
        ("Swiss Alps", ["Alps", "the Swiss Alps!"], 1, 1),
        ("red red blue", ["red blue blue"], 0, 2 / 3),
        ("Rhine", ["Aar"], 0, 0),
        # No answer expected, as SQuAD 2.0 has it.
        ("", [], 1, 1),
        ("Aar", [], 0, 0),
        ("", ["Aar"], 0, 0),
        # An expected answer without words counts only where there is no other.
        ("", ["the", "Aar"], 0, 0),
        ("a", ["the"], 1, 1),
    ],
)
def test_exact_match_and_f1_are_squads(answer: str, expected: list[str], exact: float, overlap: float) -> None:
    assert exact_match(answer, expected) == exact
    assert f1(answer, expected) == pytest.approx(overlap, abs=1e-12)


class Normalised:
    """A tokenizer for rouge-score that compares texts as SQuAD does."""

    def tokenize(self, text: str) -> list[str]:
        return normalised(text).split()


def test_f1_is_that_of_rouge_1_over_the_same_words() -> None:
    scorer = RougeScorer(["rouge1"], tokenizer=Normalised())
    generator = np.random.default_rng(4)
    words = ["the", "river", "Aar", "joins", "Rhine,", "in", "1911"]
    for _ in range(300):
        answer, *expected = (" ".join(generator.choice(words, generator.integers(1, 6))) for _ in range(4))
        expected = [text for text in expected if normalised(text)] or ["Aar"]
        best = max(scorer.score(text, answer)["rouge1"].fmeasure for text in expected)
        assert f1(answer, expected) == pytest.approx(best, abs=1e-12), (answer, expected)


def test_exact_match_and_f1_are_those_of_torchmetrics_on_the_same_answers() -> None:
    generator = np.random.default_rng(5)
    words = ["the", "The", "river", "Aar", "joins", "Rhine,", "in", "1911", "a", "U.S.", "Zürich", "“old”", "an"]
    predictions: list[dict[str, str]] = []
    references: list[Any] = []
    ours: list[tuple[float, float]] = []
    for number in range(500):
        answer, *expected = (" ".join(generator.choice(words, generator.integers(1, 6))) for _ in range(4))
        expected = [text for text in expected if normalised(text)] or ["Aar"]
        predictions.append({"prediction_text": answer, "id": str(number)})
        references.append({"answers": {"answer_start": [0] * len(expected), "text": expected}, "id": str(number)})
        ours.append((exact_match(answer, expected), f1(answer, expected)))
    told = squad(predictions, references)
    exact, overlap = 100 * np.mean(ours, axis=0)
    assert exact > 0
    # It counts in fp32.
    assert (exact, overlap) == pytest.approx((told["exact_match"].item(), told["f1"].item()), abs=1e-4)
