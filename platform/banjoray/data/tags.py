"""Rows whose words have a tag each: given as two lists, or as a text and the spans of characters that are named in it.

A tag is 'O', or 'B-' and 'I-' with the name of what begins or goes on there; any other set of names will do too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from banjoray.config.data import DataConfig
from banjoray.config.job import JobConfig
from banjoray.data.bad_rows import BadCell, looked_at, short, text_problem
from banjoray.data.sources import Source, check_text, left_out, read
from banjoray.data.spans import pieces, spans_of, tagged
from banjoray.data.splits import Split, Splits, cut_anywhere, named_columns
from banjoray.errors import DataError

OUTSIDE = "O"


@dataclass(frozen=True)
class _Row:
    """The names of a row's tags, and what a split adds to the columns that it reads."""

    names: list[str]
    added: Mapping[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tagged:
    """A source, whose tags are in ``column``, and its rows."""

    source: Source
    column: str
    rows: list[_Row]


def tagged_splits(job: JobConfig, token: str | None = None) -> Splits:
    """The splits of a job whose words have tags; validation cut off train where there is none.

    Columns of a split, by what the job has: ``tokens`` (words) and ``tags`` (a label id each); or ``text``, ``starts``,
    ``ends`` (characters) of its words, and ``tags``. Labels are data.labels, else the data set's own, else those of
    train: 'O', then the others sorted. Raises DataError as `sources.read` does, and with file and row for: cells of
    another kind, rows without words, words and tags of unlike numbers, spans that are no part of their text or
    overlap, a tag that is no label.
    """
    spans = job.data.columns.spans is not None
    shown = ("text",) if spans else ("tokens",)
    named = named_columns(job.data, (*shown, "spans" if spans else "tags"))
    sources = read(job.data, job.hub, named, token)
    look = _of_spans if spans else _of_words
    found = {name: look(source, named, job.data) for name, source in sources.items()}
    labels = _labels(found["train"], job.data, spans)
    splits = {}
    for name, tagged_rows in found.items():
        source, added = _with_ids(tagged_rows, labels, job.data)
        columns = {key: named[key] for key in shown}
        splits[name] = Split(name, source.rows, columns, added=added, numbers=source.numbers)
        sources[name] = source
    if "validation" not in splits:
        splits |= cut_anywhere(splits["train"], job.data.validation_fraction, job.train.seed, sources["train"].name)
    return Splits(splits["train"], splits["validation"], splits.get("test"), labels, left_out(sources))


def _of_words(source: Source, named: Mapping[str, str], data: DataConfig) -> _Tagged:
    """Rows with a list of words and a list of tags."""
    column = named["tags"]
    naming = _naming(source, column, data)

    def look(words: Any, tags: Any) -> _Row:
        _check_words(words, named["tokens"])
        if not isinstance(tags, list):
            raise BadCell("tags", f" holds {short(tags)}; needed a list with a tag for every word", column)
        if len(tags) != len(words):
            told = f" holds {len(tags)} tags for {len(words)} words; needed a tag for every word"
            raise BadCell("words and tags", told, column)
        return _Row([naming(tag, f", tag {number}") for number, tag in enumerate(tags, start=1)])

    cells = zip(source.rows[named["tokens"]][:], source.rows[column][:], strict=True)
    rows, findings = looked_at(cells, column, look)
    return _Tagged(source.without(findings), column, rows)


def _check_words(words: Any, column: str) -> None:
    if not isinstance(words, list):
        raise BadCell("words", f" holds {short(words)}; needed a list of words", column)
    for number, word in enumerate(words, start=1):
        if not isinstance(word, str):
            raise BadCell("words", f", word {number} is {short(word)}; needed text", column)
    if not any(word.strip() for word in words):
        raise BadCell("words", f" holds {'only blanks' if words else 'no words'}; needed a list of words", column)
    problem = text_problem(" ".join(words))
    if problem:
        raise BadCell(problem[0], f" holds {problem[1]}", column)


def _of_spans(source: Source, named: Mapping[str, str], data: DataConfig) -> _Tagged:
    """Rows with a text and its spans: words and tags are made of them."""
    source = check_text(source, named["text"])
    column = named["spans"]
    naming = _naming(source, column, data)

    def look(text: str, cell: Any) -> _Row:
        spans = spans_of(cell, text, naming)
        words = pieces(text, {edge for span in spans for edge in (span.start, span.end)})
        added = {"starts": [start for start, _ in words], "ends": [end for _, end in words]}
        return _Row(tagged(words, spans, OUTSIDE), added)

    cells = zip(source.rows[named["text"]][:], source.rows[column][:], strict=True)
    rows, findings = looked_at(cells, column, look)
    return _Tagged(source.without(findings), column, rows)


def _declared(source: Source, column: str) -> Sequence[str] | None:
    """The names that the data set itself gives to its numbers, of tags or of spans' labels."""
    from datasets import ClassLabel

    inner = getattr(source.rows.features[column], "feature", None)
    if isinstance(inner, Mapping):
        inner = inner.get("label")
    return list(inner.names) if isinstance(inner, ClassLabel) else None


def _naming(source: Source, column: str, data: DataConfig) -> Callable[[Any, str], str]:
    """Turns a cell's name or number into a name; raises BadCell, which begins with the place that it is given."""
    names = _declared(source, column) or data.labels

    def name(found: Any, place: str) -> str:
        if isinstance(found, str) and found.strip():
            return found
        if isinstance(found, bool) or not isinstance(found, int):
            raise BadCell("tags", f"{place} is {short(found)}; needed a name, or a number that has one")
        if names is None:
            told = f"{place} is the number {found}, and the data set has no names; set data.labels to them"
            raise BadCell("tags", told)
        if not 0 <= found < len(names):
            raise BadCell("tags", f"{place} is the number {found}; there are names for 0 to {len(names) - 1}")
        return names[found]

    return name


def _labels(train: _Tagged, data: DataConfig, spans: bool) -> tuple[str, ...]:
    """The labels in the order of their ids."""
    declared = _declared(train.source, train.column)
    if data.labels is not None:
        labels = tuple(data.labels)
        if len(set(labels)) != len(labels):
            raise DataError(f"data.labels: a name stands twice in {data.labels}")
        if spans and OUTSIDE not in labels:
            raise DataError(f"data.labels: found {', '.join(labels)}; needed '{OUTSIDE}' too, for words in no span")
        return labels
    if declared is not None and not spans:
        return tuple(declared)
    seen = {name for row in train.rows for name in row.names}
    if spans:
        types = {name[2:] for name in seen - {OUTSIDE}} | set(declared or ())
        seen = {OUTSIDE, *(f"{part}-{kind}" for part in "BI" for kind in types)}
    if len(seen) < 2:
        only = "no spans" if spans else f"one tag, '{min(seen)}'"
        raise DataError(f"data: {train.source.name} shows {only}; there is nothing to tell apart")
    return tuple(sorted(seen, key=lambda name: (name != OUTSIDE, name)))


def _with_ids(tagged_rows: _Tagged, labels: tuple[str, ...], data: DataConfig) -> tuple[Source, dict[str, list[Any]]]:
    """The source, and what a split adds to its columns: the label id of every word, as ``tags``."""
    ids = {name: number for number, name in enumerate(labels)}
    why = "data.labels does not list" if data.labels is not None else "train never shows"
    cure = "" if data.labels is not None else "; name all of them in data.labels to have it learned anyway"

    def look(row: _Row) -> Mapping[str, list[int]]:
        unknown = next((name for name in row.names if name not in ids), None)
        if unknown is not None:
            told = f" holds the tag {short(unknown)}, which {why}; known are {', '.join(labels)}{cure}"
            raise BadCell("unknown label", told)
        return {**row.added, "tags": [ids[name] for name in row.names]}

    rows, findings = looked_at(zip(tagged_rows.rows), tagged_rows.column, look)
    source = tagged_rows.source.without(findings)
    return source, {key: [row[key] for row in rows] for key in rows[0]}
