"""A text that is longer than a model takes, cut into windows that overlap; from which each token's prediction is read.

The windows lie as the tokenizers' own overflow does. They are cut here since the tokenizer keeps the place of its cut
as state: requests that want different ones would meet in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from banjoray.data.tokens import inputs_of


class Window(NamedTuple):
    """Tokens ``[start, end)`` of a text; predictions for ``[first, last)`` of them are read from this window."""

    start: int
    end: int
    first: int
    last: int


def windows(words: Sequence[int | None], room: int, stride: int) -> list[Window]:
    """Windows of at most ``room`` tokens, of which neighbours share ``stride`` (less than ``room``); at least one.

    ``words`` says which word each token is of. A word is read from the window in which it has most context, the lesser
    of the tokens before and after it, where the text's own ends count as far away; so every token is read once. Of a
    word that no window holds whole, each token is by itself.
    """
    length, starts = len(words), [0]
    while starts[-1] + room < length:
        starts.append(starts[-1] + room - stride)
    bounds = [0]
    for before, after in pairwise(starts):
        bounds.append(max(bounds[-1], _bound(words, after, before + room)))
    bounds.append(length)
    return [
        Window(start, min(start + room, length), first, last)
        for start, (first, last) in zip(starts, pairwise(bounds), strict=True)
    ]


def _bound(words: Sequence[int | None], start: int, end: int) -> int:
    """The first token that is read from the later of two windows, which share ``[start, end)``."""
    middle = (start + end + 1) // 2
    word = words[middle]
    if word is None or words[middle - 1] != word:
        return middle
    first = last = middle
    # One step out of either window is as far as it matters: where blanks are rare, a word may be a whole text.
    while first >= max(1, start) and words[first - 1] == word:
        first -= 1
    while last + 1 < min(len(words), end + 1) and words[last + 1] == word:
        last += 1
    earlier, later = end - 1 - last, first - start
    if max(earlier, later) < 0:
        return middle
    return first if later > earlier else last + 1


@dataclass(frozen=True)
class Pieces:
    """A text as the tokenizer cuts it, whole, its special tokens apart.

    ``inputs`` maps a model input to its ids, with the special tokens: ``head`` before the text's own, ``tail`` after
    them. Of the text's own: ``offsets`` in characters, and ``words``, the number of the tokenizer's own word.
    """

    inputs: Mapping[str, Sequence[int]]
    head: int
    tail: int
    offsets: Sequence[tuple[int, int]]
    words: Sequence[int | None]

    def part(self, window: Window) -> dict[str, list[int]]:
        """The model inputs of a window."""
        low, high = self.head + window.start, self.head + window.end
        end = self.head + len(self.offsets)
        return {name: [*ids[: self.head], *ids[low:high], *ids[end:]] for name, ids in self.inputs.items()}

    def beside(self, window: Window, cells: Sequence[int], fill: int) -> list[int]:
        """``cells``, one per token of the text, beside a window's ids: ``fill`` where it does not read the token."""
        before = self.head + window.first - window.start
        after = window.end - window.last + self.tail
        return [*[fill] * before, *cells[window.first : window.last], *[fill] * after]


def pieces_of(texts: Sequence[str], tokenizer: Any) -> list[Pieces]:
    """Texts as a fast tokenizer cuts them, uncut."""
    encoded = tokenizer(list(texts), truncation=False, verbose=False)
    inputs = inputs_of(encoded)
    found = []
    for number, part in enumerate(encoded.encodings):
        special = part.special_tokens_mask
        head = next((at for at, mark in enumerate(special) if not mark), len(special))
        tail = next((at for at, mark in enumerate(reversed(special)) if not mark), 0)
        own = slice(head, len(special) - tail)
        ids = {name: cells[number] for name, cells in inputs.items()}
        found.append(Pieces(ids, head, tail, part.offsets[own], part.word_ids[own]))
    return found
