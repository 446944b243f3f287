"""CoNLL files: a word a line, its tag in the last column, a blank line between sentences."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import fsspec

from banjoray.data.sources import Source
from banjoray.errors import DataError

_BETWEEN_DOCUMENTS = "-DOCSTART-"


@dataclass(frozen=True)
class Sentences(Source):
    """Rows that were sentences of a CoNLL file; ``lines`` says at which line, from 1, each begins."""

    lines: tuple[int, ...]

    def where(self, row: int) -> str:
        """The sentence and the line at which it begins; both count from 1."""
        return f"{self.name} row {row + 1} (from line {self.lines[row]})"


def read_conll(path: str, name: str, columns: Mapping[str, str]) -> Sentences:
    """The sentences of a local file or fsspec URL, as a list of words and a list of tags each.

    The first column is the word, the last its tag; columns are cut at tabs where a line has one, else at blanks. Lines
    with -DOCSTART- stand between documents and are no words. ``columns`` names the two lists, as data.columns does.
    Raises DataError with the line: not UTF-8, one column only, another number of columns than the first word has.
    """
    import datasets

    words: list[list[str]] = []
    tags: list[list[str]] = []
    lines: list[int] = []
    width, open_sentence = 0, False
    for number, line in _lines(path, name):
        cells = _cells(line)
        if not cells or cells[0] == _BETWEEN_DOCUMENTS:
            open_sentence = False
            continue
        width = width or len(cells)
        if len(cells) < 2 or len(cells) != width:
            needed = "a word and its tag" if width < 2 else f"{width}, as the first word has"
            found = f"{len(cells)} column{'s' * (len(cells) > 1)}"
            raise DataError(f"data: {name} can't be read: line {number} has {found} ({line!r}); needed {needed}")
        if not open_sentence:
            words.append([])
            tags.append([])
            lines.append(number)
            open_sentence = True
        words[-1].append(cells[0])
        tags[-1].append(cells[-1])
    named = {columns.get("tokens", "tokens"): words, columns.get("tags", "tags"): tags}
    return Sentences(datasets.Dataset.from_dict(named), name, tuple(lines))


def _lines(path: str, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines; cut at line feeds alone, since words may hold other characters that Python takes for ends."""
    with fsspec.open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                at = error.start + 1
                raise DataError(
                    f"data: {name} can't be read: line {number} is not UTF-8 (byte {at} of the line)"
                ) from None
            yield number, line.rstrip("\r\n")


def _cells(line: str) -> list[str]:
    # Not str.split(), which cuts at no-break spaces too, and those stand in words.
    parts = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
    cells = [part.strip(" ") for part in parts]
    return cells if any(cells) else []
