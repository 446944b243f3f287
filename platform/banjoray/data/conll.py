"""CoNLL files: a word a line, its tag in the last column, a blank line between sentences."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import fsspec
import numpy as np

from banjoray.data.bad_rows import BadRow, short
from banjoray.data.sources import Source

_BETWEEN_DOCUMENTS = "-DOCSTART-"


@dataclass(frozen=True)
class Sentences(Source):
    """Rows that were sentences of a CoNLL file; ``lines`` says of each in the file at which line, from 1, it begins."""

    lines: tuple[int, ...] = ()

    def where(self, row: int) -> str:
        """The sentence and the line at which it begins; both count from 1."""
        number = self.number(row)
        return f"{self.name} row {number} (from line {self.lines[number - 1]})"


def read_conll(path: str, name: str, columns: Mapping[str, str], skips: bool) -> Sentences:
    """The sentences of a local file or fsspec URL, as a list of words and a list of tags each.

    The first column is the word, the last its tag; columns are cut at tabs where a line has one, else at blanks. Lines
    with -DOCSTART- stand between documents and are no words. ``columns`` names the two lists, as data.columns does.
    A sentence with a line that is not UTF-8, has one column only, or another number of columns than the first word,
    is left out where the job ``skips`` bad rows; raises DataError with the line.
    """
    import datasets

    sentences: list[list[tuple[str, str]]] = []
    lines: list[int] = []
    bad: dict[int, BadRow] = {}
    width, open_sentence = 0, False
    for number, line, foreign in _lines(path):
        cells = _cells(line)
        if not foreign and (not cells or cells[0] == _BETWEEN_DOCUMENTS):
            open_sentence = False
            continue
        if not open_sentence:
            sentences.append([])
            lines.append(number)
            open_sentence = True
        found = foreign or _of_another_width(cells, width, line)
        if found:
            kind = "not UTF-8" if foreign else "columns"
            bad.setdefault(len(lines), BadRow(name, len(lines), name, kind, f": line {number} {found}"))
            continue
        width = len(cells)
        sentences[-1].append((cells[0], cells[-1]))
    if bad and not skips:
        raise next(iter(bad.values())).refusal(len(bad), " can't be read")
    good = [row for row in range(len(lines)) if row + 1 not in bad]
    named = {
        columns.get(key, key): [[word[part] for word in sentences[row]] for row in good]
        for part, key in enumerate(("tokens", "tags"))
    }
    rows = datasets.Dataset.from_dict(named)
    source = Sentences(rows, name, skips, np.array(good, dtype=int), tuple(bad.values()), tuple(lines))
    source.some_left()
    return source


def _of_another_width(cells: list[str], width: int, line: str) -> str:
    """What is wrong with a line's columns; ``width`` are those of the words before, 0 for none."""
    if len(cells) >= 2 and len(cells) == (width or len(cells)):
        return ""
    needed = "a word and its tag" if width < 2 else f"{width}, as the first word has"
    return f"has {len(cells)} column{'s' * (len(cells) > 1)} ({short(line)}); needed {needed}"


def _lines(path: str) -> Iterator[tuple[int, str, str]]:
    """Numbered lines, and what is foreign in each; cut at line feeds alone, since words may hold other line ends."""
    with fsspec.open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            coding, foreign = "utf-8-sig" if number == 1 else "utf-8", ""
            try:
                line = raw.decode(coding)
            except UnicodeDecodeError as error:
                line, foreign = "", f"is not UTF-8 (byte {error.start + 1} of the line)"
            yield number, line.rstrip("\r\n"), foreign


def _cells(line: str) -> list[str]:
    # Not str.split(), which cuts at no-break spaces too, and those stand in words.
    parts = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
    cells = [part.strip(" ") for part in parts]
    return cells if any(cells) else []
