"""Files of lines, row by row: which rows a reader can't take, and a copy of the file without them."""

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from banjoray.data.bad_rows import BadCell, half_a_character, short
from banjoray.errors import DataError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
# Python's csv module refuses a cell of more than 128 KiB unless told.
_ANY_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Record:
    """A row of a file as it stands there; ``number`` is that of the row, from 0, -1 of a header.

    ``kind`` and ``told`` are as in a `Finding`, empty for a row that can be read.
    """

    number: int
    text: str
    kind: str = ""
    told: str = ""


def records(path: str, name: str, kinds: bool) -> Iterator[Record]:
    """The rows of a txt, csv, tsv, json or jsonl file; none of another one.

    Rows count as readers count them, which see no blank line of a table or of JSON Lines. With ``kinds``, a row whose
    cell is of another kind than those before it can't be read either. Raises DataError: what is no row is not UTF-8.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".txt":
        for number, (line, foreign) in enumerate(_lines(path, "")):
            yield Record(number, line, *(("not UTF-8", f": {foreign}") if foreign else ()))
    elif suffix in SEPARATORS:
        try:
            yield from _of_table(path, name, SEPARATORS[suffix])
        except csv.Error as error:
            raise DataError(f"data: {name} can't be read: {error}") from None
    elif suffix == ".jsonl" or (suffix == ".json" and _is_lines(path)):
        yield from _of_objects(path, kinds)
    elif suffix == ".json":
        for _, foreign in _lines(path, "\n"):
            if foreign:
                raise DataError(f"data: {name} can't be read: {foreign}")


def parsed(line: str) -> Any:
    """What a line of JSON holds; raises BadCell, which says what the line is."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadCell("not JSON", f"not JSON ({error.msg} at character {error.pos})") from None
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits; lists in lists in lists.
        raise BadCell("not JSON", f"not JSON that can be read ({error})") from None
    if "\\u" in line and half_a_character(json.dumps(found, ensure_ascii=False)):
        raise BadCell("not UTF-8", "not UTF-8 (half a character: a lone surrogate)")
    return found


def without_bad(path: str, good: Iterable[Record]) -> Path:
    """A file with some of the rows of ``path``, in the cache of `datasets`: the same rows are written once."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "banjoray"
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    handle, staged = tempfile.mkstemp(dir=folder, prefix=".staging-")
    with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
        for record in good:
            digest.update(record.text.encode())
            file.write(record.text)
    copy = folder / f"{digest.hexdigest()[:32]}{Path(path).suffix.lower()}"
    # Not written again: `datasets` knows a file by its time too, and would read it once more.
    if copy.exists():
        Path(staged).unlink()
    else:
        Path(staged).replace(copy)
    return copy


def _lines(path: str, newline: str, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """Lines with their ends, and what is foreign in each; ``newline`` as in `open`."""
    with fsspec.open(path, "rt", encoding=encoding, errors="surrogateescape", newline=newline) as file:
        for number, line in enumerate(file, start=1):
            yield line, _foreign(line, number)


def _foreign(line: str, number: int) -> str:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        return f"line {number} is not UTF-8 (byte {len(line[: error.start].encode()) + 1} of the line)"
    return ""


def _of_table(path: str, name: str, separator: str) -> Iterator[Record]:
    """The header and the rows, quoted anew."""
    csv.field_size_limit(_ANY_SIZE)
    foreign: list[str] = []

    def lines() -> Iterator[str]:
        for line, told in _lines(path, "", "utf-8-sig"):
            foreign.extend([told] * bool(told))
            yield line

    reader = csv.reader(lines(), delimiter=separator)
    width, number = 0, -1
    for cells in reader:
        # A reader sees no row in a blank line.
        if not cells and not foreign:
            continue
        if number < 0 and foreign:
            raise DataError(f"data: {name} can't be read: {foreign[0]}")
        width = width or len(cells)
        text = io.StringIO()
        csv.writer(text, delimiter=separator).writerow(cells)
        kind = told = ""
        if foreign:
            kind, told = "not UTF-8", f": {foreign[0]}"
            foreign.clear()
        elif len(cells) > width:
            kind = "too many cells"
            told = f": row {number + 1} has {len(cells)} cells; the header has {width}"
        yield Record(number, text.getvalue(), kind, told)
        number += 1


def _is_lines(path: str) -> bool:
    """Whether a file is JSON Lines: its first line is a whole object."""
    line, foreign = next(_lines(path, "\n", "utf-8-sig"), ("", ""))
    try:
        return not foreign and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _of_objects(path: str, kinds: bool) -> Iterator[Record]:
    seen: dict[str, type] = {}
    number = 0
    for line, foreign in _lines(path, "\n", "utf-8-sig"):
        if not line.strip():
            continue
        try:
            if foreign:
                raise BadCell("not UTF-8", foreign)
            _check_object(line.rstrip("\r\n"), number + 1, seen if kinds else None)
            yield Record(number, line)
        except BadCell as error:
            yield Record(number, line, error.kind, f": {error.told}")
        number += 1


def _check_object(line: str, number: int, seen: dict[str, type] | None) -> None:
    """Refuse a line that is no row; ``seen`` are the kinds of the cells before, by column, and gets those of this."""
    try:
        row = parsed(line)
    except BadCell as error:
        raise BadCell(error.kind, f"row {number} is {error.told}") from None
    if not isinstance(row, dict):
        raise BadCell("no object", f"row {number} holds {type(row).__name__}, needed an object with columns")
    for column, cell in row.items() if seen is not None else ():
        # A reader takes whole numbers among others.
        kind = float if type(cell) is int else type(cell)
        before = kind if cell is None or seen is None else seen.setdefault(column, kind)
        if kind is not before:
            named = "number" if before is float else before.__name__
            raise BadCell(
                "another kind", f"row {number}, column '{column}' holds {short(cell)}; the rows before hold {named}"
            )
