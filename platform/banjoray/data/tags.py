"""Rows whose words have a tag each: given as two lists, or as a text and the spans of characters that are named in it.

A tag is 'O', or 'B-' and 'I-' with the name of what begins or goes on there; any other set of names will do too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from banjoray.config.job import DataConfig, JobConfig
from banjoray.data.sources import Source, check_text, read
from banjoray.data.spans import pieces, spans_of, tagged
from banjoray.data.splits import Split, Splits, cut_anywhere, named_columns
from banjoray.errors import DataError

OUTSIDE = "O"


@dataclass(frozen=True)
class _Tagged:
    """A source's rows: the names of the tags of each, and what a split adds to the columns that it reads."""

    source: Source
    column: str
    names: list[list[str]]
    added: Mapping[str, list[Any]] = field(default_factory=dict)


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
    for name, rows in found.items():
        tags = {"tags": _ids(rows, labels, job.data)}
        splits[name] = Split(name, rows.source.rows, {key: named[key] for key in shown}, added={**rows.added, **tags})
    if "validation" not in splits:
        splits |= cut_anywhere(splits["train"], job.data.validation_fraction, job.train.seed, sources["train"].name)
    return Splits(splits["train"], splits["validation"], splits.get("test"), labels)


def _of_words(source: Source, named: Mapping[str, str], data: DataConfig) -> _Tagged:
    """Rows with a list of words and a list of tags."""
    names = []
    naming = _naming(source, named["tags"], data)
    both = zip(source.rows[named["tokens"]][:], source.rows[named["tags"]][:], strict=True)
    for row, (words, tags) in enumerate(both):
        where = f"data: {source.where(row)}, column '{named['tokens']}'"
        _check_words(words, where)
        place = f"data: {source.where(row)}, column '{named['tags']}'"
        if not isinstance(tags, list):
            raise DataError(f"{place} holds {tags!r}; needed a list with a tag for every word")
        if len(tags) != len(words):
            raise DataError(f"{place} holds {len(tags)} tags for {len(words)} words; needed a tag for every word")
        names.append([naming(tag, f"{place}, tag {number}") for number, tag in enumerate(tags, start=1)])
    return _Tagged(source, named["tags"], names)


def _check_words(words: Any, where: str) -> None:
    if not isinstance(words, list):
        raise DataError(f"{where} holds {words!r}; needed a list of words")
    for number, word in enumerate(words, start=1):
        if not isinstance(word, str):
            raise DataError(f"{where}, word {number} is {word!r}; needed text")
    if not any(word.strip() for word in words):
        raise DataError(f"{where} holds {'only blanks' if words else 'no words'}; needed a list of words")


def _of_spans(source: Source, named: Mapping[str, str], data: DataConfig) -> _Tagged:
    """Rows with a text and its spans: words and tags are made of them."""
    check_text(source, named["text"])
    names, starts, ends = [], [], []
    naming = _naming(source, named["spans"], data)
    both = zip(source.rows[named["text"]][:], source.rows[named["spans"]][:], strict=True)
    for row, (text, cell) in enumerate(both):
        spans = spans_of(cell, text, f"data: {source.where(row)}, column '{named['spans']}'", naming)
        words = pieces(text, {edge for span in spans for edge in (span.start, span.end)})
        starts.append([start for start, _ in words])
        ends.append([end for _, end in words])
        names.append(tagged(words, spans, OUTSIDE))
    return _Tagged(source, named["spans"], names, {"starts": starts, "ends": ends})


def _declared(source: Source, column: str) -> Sequence[str] | None:
    """The names that the data set itself gives to its numbers, of tags or of spans' labels."""
    from datasets import ClassLabel

    inner = getattr(source.rows.features[column], "feature", None)
    if isinstance(inner, Mapping):
        inner = inner.get("label")
    return list(inner.names) if isinstance(inner, ClassLabel) else None


def _naming(source: Source, column: str, data: DataConfig) -> Callable[[Any, str], str]:
    """Turns a cell's name or number into a name; raises DataError, which begins with the place that it is given."""
    names = _declared(source, column) or data.labels

    def name(found: Any, place: str) -> str:
        if isinstance(found, str) and found.strip():
            return found
        if isinstance(found, bool) or not isinstance(found, int):
            raise DataError(f"{place} is {found!r}; needed a name, or a number that has one")
        if names is None:
            raise DataError(f"{place} is the number {found}, and the data set has no names; set data.labels to them")
        if not 0 <= found < len(names):
            raise DataError(f"{place} is the number {found}; there are names for 0 to {len(names) - 1}")
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
    seen = {name for names in train.names for name in names}
    if spans:
        types = {name[2:] for name in seen - {OUTSIDE}} | set(declared or ())
        seen = {OUTSIDE, *(f"{part}-{kind}" for part in "BI" for kind in types)}
    if len(seen) < 2:
        only = "no spans" if spans else f"one tag, '{min(seen)}'"
        raise DataError(f"data: {train.source.name} shows {only}; there is nothing to tell apart")
    return tuple(sorted(seen, key=lambda name: (name != OUTSIDE, name)))


def _ids(rows: _Tagged, labels: tuple[str, ...], data: DataConfig) -> list[list[int]]:
    """The label id of every word."""
    ids = {name: number for number, name in enumerate(labels)}
    found = []
    for row, names in enumerate(rows.names):
        unknown = next((name for name in names if name not in ids), None)
        if unknown is not None:
            why = "data.labels does not list" if data.labels is not None else "train never shows"
            cure = "" if data.labels is not None else "; name all of them in data.labels to have it learned anyway"
            raise DataError(
                f"data: {rows.source.where(row)}, column '{rows.column}' holds the tag {unknown!r}, which {why}; "
                f"known are {', '.join(labels)}{cure}"
            )
        found.append([ids[name] for name in names])
    return found
