"""From a label per token to entities, as transformers' TokenClassificationPipeline makes them; and what they are worth.

Its rules are kept as they are, also those that only guess (what a word is for a tokenizer without a mark for that), so
that a registered folder gives the same entities there as here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from banjoray.data.tags import OUTSIDE

STRATEGIES = ("none", "simple", "first", "average", "max")


@dataclass(frozen=True)
class Piece:
    """A token, or a word, of a text: how it is written, its probability of every label, where it stands.

    ``index`` is its number among the text's tokens, special ones too; ``joins`` says that it goes on with the word
    before it.
    """

    word: str
    scores: np.ndarray
    start: int
    end: int
    index: int
    joins: bool


@dataclass(frozen=True)
class _Found:
    """A token or word with the label that it got."""

    label: str
    score: float
    piece: Piece


@dataclass(frozen=True)
class Read:
    """The tokens of a text whose predictions are read, in order.

    ``ids`` (tokens,), ``starts`` and ``ends`` (tokens,) in characters, ``scores`` (tokens, labels) as probabilities;
    ``head`` is how many special tokens stand before them.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    scores: np.ndarray
    head: int


def pieces_read(text: str, read: Read, tokenizer: Any) -> list[Piece]:
    """The tokens as pieces of the text; an unknown one is written as the text has it."""
    # WordPiece's ##: such a token is longer than what it stands for.
    marked = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
    words = tokenizer.convert_ids_to_tokens(read.ids.tolist())
    places = zip(words, read.ids.tolist(), read.starts.tolist(), read.ends.tolist(), read.scores, strict=True)
    pieces = []
    for number, (word, token, start, end, scores) in enumerate(places):
        joins = len(word) != end - start if marked else start > 0 and " " not in text[start - 1 : start + 1]
        if token == tokenizer.unk_token_id:
            word, joins = text[start:end], False
        pieces.append(Piece(word, scores, start, end, read.head + number, joins))
    return pieces


def entries(pieces: Sequence[Piece], strategy: str, labels: Sequence[str], tokenizer: Any) -> list[dict[str, Any]]:
    """What is answered about a text: an entry per token (strategy none), or per run of tokens with one name."""
    if strategy in ("none", "simple"):
        found = [_labelled(piece, piece.scores, labels) for piece in pieces]
    else:
        found = [_as_word(word, strategy, labels, tokenizer) for word in _words(pieces)]
    if strategy == "none":
        return [_token(one) for one in found]
    return [_entity(group, tokenizer) for group in _groups(found)]


def _token(found: _Found) -> dict[str, Any]:
    piece = found.piece
    told = {"entity": found.label, "score": found.score, "index": piece.index, "word": piece.word}
    return told | {"start": piece.start, "end": piece.end}


def _labelled(piece: Piece, scores: np.ndarray, labels: Sequence[str]) -> _Found:
    best = int(scores.argmax())
    return _Found(labels[best], float(scores[best]), piece)


def _words(pieces: Sequence[Piece]) -> list[list[Piece]]:
    words: list[list[Piece]] = []
    for piece in pieces:
        if words and piece.joins:
            words[-1].append(piece)
        else:
            words.append([piece])
    return words


def _as_word(word: Sequence[Piece], strategy: str, labels: Sequence[str], tokenizer: Any) -> _Found:
    """A word of one label: that of its first token, of the mean over its tokens, or of the surest of them."""
    match strategy:
        case "first":
            scores = word[0].scores
        case "average":
            scores = np.mean([piece.scores for piece in word], axis=0)
        case _:
            scores = max(word, key=lambda piece: float(piece.scores.max())).scores
    written = tokenizer.convert_tokens_to_string([piece.word for piece in word])
    whole = Piece(written, scores, word[0].start, word[-1].end, word[0].index, joins=False)
    return _labelled(whole, scores, labels)


def _groups(found: Sequence[_Found]) -> list[list[_Found]]:
    """Neighbours with one name; a label that begins with B- begins a new group."""
    groups: list[list[_Found]] = []
    for one in found:
        begins, name = one.label.startswith("B-"), _name(one.label)
        if groups and not begins and _name(groups[-1][-1].label) == name:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _name(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label


def _entity(group: Sequence[_Found], tokenizer: Any) -> dict[str, Any]:
    pieces = [one.piece for one in group]
    return {
        "entity_group": group[0].label.split("-", 1)[-1],
        "score": float(np.mean([one.score for one in group])),
        "word": tokenizer.convert_tokens_to_string([piece.word for piece in pieces]),
        "start": pieces[0].start,
        "end": pieces[-1].end,
    }


def gone_on(label: str) -> str:
    """The label of a word that shares the token of the word before it, which got ``label``."""
    return f"I-{label[2:]}" if label.startswith("B-") else label


def entity_metrics(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Precision, recall and F1 over all entities, and the same with support by their type, as seqeval has them.

    An entity is right if its words and its type are. Labels without B- or I- count as runs of one type.
    """
    from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support

    told = {label: _in_runs(label) for label in set(chain.from_iterable((*gold, *predicted)))}
    sides = [[[told[label] for label in row] for row in side] for side in (gold, predicted)]
    types = sorted({found[0] for side in sides for found in get_entities(side)})
    names = ("precision", "recall", "f1")
    if not types:
        return dict.fromkeys(names, 0.0), {}
    whole = precision_recall_fscore_support(*sides, average="micro", zero_division=0)
    parts = precision_recall_fscore_support(*sides, average=None, zero_division=0)
    table = {
        kind: dict(zip((*names, "support"), map(float, values), strict=True))
        for kind, *values in zip(types, *parts, strict=True)
    }
    return dict(zip(names, map(float, whole[:3]), strict=True)), table


def _in_runs(label: str) -> str:
    if label == OUTSIDE or (label[:1] in tuple("BIES") and label[1:2] == "-"):
        return label
    # The same marks by the names of another scheme.
    last_or_only = {"L-": "E-", "U-": "S-"}.get(label[:2])
    return f"{last_or_only}{label[2:]}" if last_or_only else f"I-{label}"
