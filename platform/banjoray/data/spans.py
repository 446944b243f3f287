"""Spans of characters with a name, as tags of the words that they cover."""

import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from banjoray.data.bad_rows import BadCell, short

KIND = "spans"
_SHAPE = '{"start", "end", "label"}'
# Two that are no marks and still belong to what stands before them; the first one does not hold what follows.
_NON_JOINER, _JOINER = "\u200c", "\u200d"


@dataclass(frozen=True)
class Span:
    """Characters ``[start, end)`` of a text, and what they name."""

    start: int
    end: int
    label: str


def spans_of(cell: Any, text: str, naming: Callable[[Any, str], str]) -> list[Span]:
    """The spans in a cell, from left to right; ``naming`` turns a label and its place into a name.

    Raises BadCell: another shape, a span that is not in the text, begins or ends inside a character (before a combining
    mark), covers blanks only, or overlaps another one.
    """
    if not isinstance(cell, list):
        raise BadCell(KIND, f" holds {short(cell)}; needed a list of {_SHAPE}, empty where nothing is named")
    found = [_span(entry, text, f", span {number}", naming) for number, entry in enumerate(cell, start=1)]
    found.sort(key=lambda span: (span.start, span.end))
    for left, right in pairwise(found):
        if right.start < left.end:
            raise BadCell(
                KIND,
                f": [{left.start}, {left.end}) '{left.label}' and [{right.start}, {right.end}) '{right.label}' "
                "overlap; needed spans apart, since a word has one tag",
            )
    return found


def _span(entry: Any, text: str, place: str, naming: Callable[[Any, str], str]) -> Span:
    if not isinstance(entry, dict) or not {"start", "end", "label"} <= set(entry):
        raise BadCell(KIND, f"{place} is {short(entry)}; needed {_SHAPE}")
    start, end = (_edge(entry[key], f"{place}: {key}") for key in ("start", "end"))
    if not 0 <= start < end <= len(text):
        raise BadCell(KIND, f"{place} is [{start}, {end}); needed 0 <= start < end <= {len(text)}, the text's length")
    for edge in (start, end):
        if 0 < edge < len(text) and (_marks(text[edge]) or text[edge - 1] == _JOINER):
            seen = text[max(0, edge - 5) : edge + 5]
            raise BadCell(
                KIND, f"{place} is [{start}, {end}); {edge} is inside a character of {seen!r}, not at its edge"
            )
    if not text[start:end].strip():
        raise BadCell(KIND, f"{place} is [{start}, {end}), which covers blanks only; needed a word")
    return Span(start, end, naming(entry["label"], f"{place}: label"))


def _edge(found: Any, place: str) -> int:
    # One number with a point makes all numbers of a file's column such ones.
    edge = int(found) if isinstance(found, float) and found.is_integer() else found
    if not isinstance(edge, int) or isinstance(edge, bool):
        raise BadCell(KIND, f"{place} is {short(found)}; needed a number of characters")
    return edge


def pieces(text: str, edges: Collection[int]) -> list[tuple[int, int]]:
    """The words of a text as (start, end) in characters, cut at ``edges`` too.

    A word is a run of letters and digits, a character of a script that puts no blanks between words (Han, kana), or any
    other single character; combining marks belong to what stands before them.
    """
    found: list[tuple[int, int]] = []
    before = ""
    for at, letter in enumerate(text):
        kind = _kind(letter)
        # A mark is part of whatever it stands on.
        goes_on = kind == "mark" or (kind == before == "word")
        if kind != "blank" and found and found[-1][1] == at and goes_on and at not in edges:
            found[-1] = (found[-1][0], at + 1)
        elif kind != "blank":
            found.append((at, at + 1))
        if kind != "mark" or at in edges:
            before = kind
    return found


def tagged(words: Sequence[tuple[int, int]], spans: Sequence[Span], outside: str) -> list[str]:
    """A tag for each of ``words``, which are cut at the edges of ``spans``; both go from left to right."""
    tags = []
    left = iter(spans)
    span = next(left, None)
    begun = False
    for start, _ in words:
        while span is not None and span.end <= start:
            span, begun = next(left, None), False
        if span is None or start < span.start:
            tags.append(outside)
            continue
        tags.append(f"{'I' if begun else 'B'}-{span.label}")
        begun = True
    return tags


def _marks(letter: str) -> bool:
    return unicodedata.category(letter).startswith("M") or letter == _JOINER


@cache
def _kind(letter: str) -> str:
    if letter.isspace():
        return "blank"
    if _marks(letter) or letter == _NON_JOINER:
        return "mark"
    if "\u2e80" <= letter <= "\u9fff" or "\uf900" <= letter <= "\ufaff" or letter >= "\U00020000":
        return "sign"
    return "word" if letter.isalnum() or letter == "_" else "sign"
