"""A data set's profile as tables for a terminal, and as a page that is complete in itself."""

from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from banjoray.data.profile import Found, Lengths, Profile

if TYPE_CHECKING:
    from rich.console import RenderableType

PAGE = Path(__file__).with_name("profile.html.j2")
BAR = 30
NUMBERS = ("lowest", "median", "mean", "highest")


def profile_lines(found: Profile) -> "list[RenderableType]":
    """A profile for a terminal: rows and lengths by split, labels, the lengths of train as bars, findings."""
    lines: list[RenderableType] = [_splits(found)]
    if found.splits[0].labels:
        lines.append(_labels(found))
    if found.splits[0].numbers:
        lines.append(_numbers(found))
    return [*lines, _histogram(found), *findings(found)]


def findings(found: Profile) -> list[str]:
    """What somebody should look at before training, a line each; one line that says so where there is nothing."""
    told = []
    for split in found.splits:
        if split.lengths.over:
            share = split.lengths.over / split.rows
            told.append(
                f"{split.name}: {split.lengths.over} rows ({share:.1%}) are longer than data.max_length "
                f"{found.max_length}; 95 % have at most {split.lengths.p95:.0f} tokens"
            )
        if split.repeated.rows:
            told.append(f"{split.name}: {split.repeated.rows} rows repeat an earlier one ({_rows(split.repeated)})")
        if split.contradicting.rows:
            told.append(
                f"{split.name}: {split.contradicting.rows} rows have a text that stands under another "
                f"{'number' if split.numbers else 'label'} too "
                f"({_rows(split.contradicting)})"
            )
    told += [
        f"{both.second}: {both.found.rows} rows stand in {both.first} too ({_rows(both.found)}); a score counts them"
        for both in found.overlaps
        if both.found.rows
    ]
    return told or ["nothing to look at: no row repeats, contradicts another, is cut, or stands in two splits"]


def _rows(found: Found) -> str:
    first = ", ".join(map(str, found.first))
    return f"row{'s' * (found.rows > 1)} {first}{', ...' if found.rows > len(found.first) else ''}"


def _splits(found: Profile) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("split")
    for column in ("rows", "shortest", "median", "95 %", "longest", f"over {found.max_length}", "repeated"):
        table.add_column(column, justify="right")
    for split in found.splits:
        lengths = split.lengths
        cells = (lengths.shortest, lengths.median, lengths.p95, lengths.longest, lengths.over, split.repeated.rows)
        table.add_row(split.name, f"{split.rows:,}", *(f"{cell:,.0f}" for cell in cells))
    return table


def _labels(found: Profile) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("label")
    for split in found.splits:
        table.add_column(split.name, justify="right")
        table.add_column("share", justify="right")
    for label in found.splits[0].labels:
        cells = []
        for split in found.splits:
            count = split.labels.get(label, 0)
            cells += [f"{count:,}", f"{count / max(1, split.labelled):.1%}"]
        table.add_row(Text(label), *cells)
    return table


def _numbers(found: Profile) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("number")
    for column in NUMBERS:
        table.add_column(column, justify="right")
    for split in found.splits:
        table.add_row(split.name, *(f"{getattr(split.numbers, column):.4g}" for column in NUMBERS))
    return table


def _histogram(found: Profile) -> Table:
    lengths = found.splits[0].lengths
    table = Table(box=SIMPLE_HEAD)
    table.add_column("tokens", justify="right")
    table.add_column("train rows", justify="right")
    table.add_column("")
    most = max(lengths.counts)
    for low, high, count in bins(lengths):
        bar = "\u2588" * round(BAR * count / most)
        # Everything that is cut stands beyond this line.
        limit = " < data.max_length" if low <= found.max_length <= high else ""
        table.add_row(f"{low}-{high}", f"{count:,}", f"{bar}{limit}")
    return table


def bins(lengths: Lengths) -> list[tuple[int, int, int]]:
    """(shortest, longest, rows) of every bar: whole numbers of tokens, both included."""
    last = len(lengths.counts) - 1
    return [
        (low, high if number == last else high - 1, count)
        for number, (low, high, count) in enumerate(zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False))
    ]


def profile_page(name: str, found: Profile) -> str:
    """The profile as an HTML page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(PAGE.read_text(encoding="utf-8"))
    return page.render(name=name, found=found, findings=findings(found), bins=bins, columns=NUMBERS)
