"""Which token stands for which word of a text."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from banjoray.data.windows import Pieces

# What stands where no word is read: a token that is not the first of one.
NONE = -1


def texts_of(rows: Mapping[str, Sequence[Any]]) -> list[str]:
    """The text of every row; of a row of words, the words with a blank between them."""
    return list(rows["text"]) if "text" in rows else [" ".join(words) for words in rows["tokens"]]


def bounds_of(rows: Mapping[str, Sequence[Any]], row: int) -> list[tuple[int, int]]:
    """The words of a row as (start, end) in characters of its text."""
    if "tokens" not in rows:
        return list(zip(rows["starts"][row], rows["ends"][row], strict=True))
    lengths = [len(word) for word in rows["tokens"][row]]
    starts = accumulate((length + 1 for length in lengths), initial=0)
    return [(start, start + length) for start, length in zip(starts, lengths, strict=False)]


def first_tokens(text: str, pieces: Pieces, bounds: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """At every token of a text: the word of which it is the first, or -1, and the word until which it goes.

    The blank before a word belongs to it where the tokenizer says so: SentencePiece's may be a token by itself. A word
    may have no token (a lone variation selector, which BERT drops), or share the one that begins in the word before;
    words are counted by their place in the text, so neither shifts the others.
    """
    spans = _without_blanks(text, pieces)
    words, untils = [NONE] * len(spans), [NONE] * len(spans)
    word = 0
    for at, (start, end) in enumerate(spans):
        while word < len(bounds) and bounds[word][1] <= start:
            word += 1
        until = word
        while until < len(bounds) and bounds[until][0] < end:
            until += 1
        if start < end and until > word:
            words[at], untils[at] = word, until
            word = until
    return words, untils


def _without_blanks(text: str, pieces: Pieces) -> list[tuple[int, int]]:
    """The characters of every token without blanks before them; a token of blanks alone has those of its word's next.

    Empty where there is no such token.
    """
    spans: list[tuple[int, int]] = []
    following: tuple[int, int] = (0, 0)
    for at in reversed(range(len(pieces.offsets))):
        start, end = pieces.offsets[at]
        while start < end and text[start].isspace():
            start += 1
        if start == end:
            same = (
                at + 1 < len(pieces.words) and pieces.words[at] is not None and pieces.words[at] == pieces.words[at + 1]
            )
            start, end = following if same else (start, start)
        following = (start, end)
        spans.append(following)
    return spans[::-1]
