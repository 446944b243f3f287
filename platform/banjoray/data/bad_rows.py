"""Rows that can't be used: what is wrong with each, and what people are told where they are left out.

A check finds what is wrong with any row of a source; `Source.without` refuses the first, or leaves all of them out.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec

from banjoray.errors import DataError

# Characters. Training cuts all but the start of such a text, or makes thousands of windows of it.
TOO_LONG = 1_000_000
# Rows that are told of every source; all of them are in a file of this name.
SHOWN = 10
FILE = "bad_rows.jsonl"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Finding:
    """What is wrong with a row of a source; rows count from 0.

    ``told`` is what a message says after it has named the row, and the column if there is one; ``kind`` is what such
    findings are counted under; ``called`` is the row's own name for itself, as " (id q3)".
    """

    row: int
    kind: str
    told: str
    column: str | None = None
    called: str = ""


class BadCell(Exception):
    """Raised by what looks at one row alone; the message goes on where another one has named the row and the column."""

    def __init__(self, kind: str, told: str, column: str | None = None) -> None:
        super().__init__(kind, told, column)
        self.kind, self.told, self.column = kind, told, column


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used, named by its source; ``row`` counts from 1, None where a part of a file is no row."""

    file: str
    row: int | None
    where: str
    kind: str
    told: str
    column: str | None = None

    def __str__(self) -> str:
        return f"{self.where}{self._at}{self.told}"

    @property
    def _at(self) -> str:
        return f", column '{self.column}'" if self.column else ""

    def to_json(self) -> dict[str, Any]:
        """Where it is and what is wrong with it, as plain values."""
        return {"file": self.file, "row": self.row, "column": self.column, "reason": self.told.lstrip(" ,:")}

    def refusal(self, count: int, verb: str = "") -> DataError:
        """The error about this row, the first of ``count``; ``verb`` says what can't be done with its file."""
        more = f" ({count} such rows in all; --skip-bad-rows leaves them out)" if count > 1 else ""
        return DataError(f"data: {self.where}{self._at}{verb}{self.told}{more}")


@dataclass(frozen=True)
class LeftOut:
    """The rows of a split's source that stand in no split, of ``rows`` that there were."""

    split: str
    file: str
    rows: int
    bad: tuple[BadRow, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {"split": self.split, "file": self.file, "rows": self.rows, "bad": [row.to_json() for row in self.bad]}


def looked_at(rows: Iterable[Any], column: str, look: Callable[..., Result]) -> tuple[list[Result], list[Finding]]:
    """What ``look`` makes of every row's cells, and what is wrong with those for which it raises BadCell.

    A BadCell that names no column is about ``column``.
    """
    made, found = [], []
    for row, cells in enumerate(rows):
        try:
            made.append(look(*cells))
        except BadCell as error:
            found.append(Finding(row, error.kind, error.told, error.column or column))
    return made, found


def short(found: Any) -> str:
    """A cell as a message shows it."""
    told = repr(found)
    return told if len(told) <= 60 else f"{told[:57]}..."


def half_a_character(text: str) -> bool:
    """Whether a text holds a lone surrogate, which JSON can say and UTF-8 can't."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def text_problem(cell: Any) -> tuple[str, str] | None:
    """(kind, what a message says of it) of a cell that is no text to learn from or to answer; None for one that is."""
    if not isinstance(cell, str):
        return "no text", f"{'nothing' if cell is None else short(cell)}; needed text"
    if len(cell) >= TOO_LONG:
        return (
            "too long",
            f"{len(cell):,} characters; needed fewer than {TOO_LONG:,}: cut it, or make rows of its parts",
        )
    if not cell.strip():
        return "no text", "only blanks; needed text"
    if half_a_character(cell):
        return "not UTF-8", "half a character (a lone surrogate); needed text"
    return None


def lines_about(left_out: Sequence[LeftOut]) -> list[str]:
    """Lines for people: of each source how many rows were left out and why, and the first few of them."""
    lines = []
    for source in left_out:
        kinds = Counter(row.kind for row in source.bad)
        counted = ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common())
        lines.append(f"{source.split}: {len(source.bad)} of {source.rows} rows of {source.file} left out ({counted})")
        lines += [f"  {row}" for row in source.bad[:SHOWN]]
        lines += [f"  and {len(source.bad) - SHOWN} more"] * (len(source.bad) > SHOWN)
    return lines


def write_list(left_out: Sequence[LeftOut], folder: str) -> str | None:
    """The file in ``folder`` (a path or URL) with a JSON line for every row that was left out; None if none was."""
    if not left_out:
        return None
    place = f"{folder.rstrip('/')}/{FILE}"
    with fsspec.open(place, "w", encoding="utf-8") as file:
        for source in left_out:
            for row in source.bad:
                file.write(json.dumps(row.to_json(), ensure_ascii=False) + "\n")
    return place
