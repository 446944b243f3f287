"""A search as it goes: a table of its trials on a terminal, a line per epoch in a log."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from banjoray.config.job import JobConfig
from banjoray.reports.charts import label
from banjoray.reports.progress import duration
from banjoray.tuning.space import search_of
from banjoray.tuning.study import TrialMoment, in_lines

# Lines of a terminal that are not trials: the summary, the head and its rule, how many are left out, the cursor's.
AROUND = 5
# What a narrow terminal goes without, first to last, rather than cut the values to less than so many characters.
GIVES_WAY = ("score", "states", "time", "values")
LEAST_VALUES, GAP = 20, 2
# How much of a searched key's name is shown at least, where its values are shorter: from so wide on, and below.
WIDE, NAME_WIDE, NAME_NARROW = 100, 24, 8


class StudyProgress:
    """Takes the moments of a study's trials; shows them on ``console``. ``clock`` counts seconds.

    As something to print, it is the table: the newest moment of every trial, as many as the terminal has lines for,
    those that run before those that have ended, these best first; the best of all has a star.
    """

    def __init__(self, console: Console, job: JobConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock, self._began = console, clock, clock()
        self._metric, self._points = job.train.metric, search_of(job).points
        self._sign = -1.0 if job.train.mode == "max" else 1.0
        self._in_lines = in_lines(self._print, self._metric)
        # Replaced, never changed: another thread draws it. With when each moment came.
        self._newest: dict[str, tuple[TrialMoment, float]] = {}

    def __call__(self, moment: TrialMoment) -> None:
        """Show a moment. Why a trial failed is a line of its own, which stays: the table has no room for it."""
        if not self._console.is_interactive or moment.status == "failed":
            self._in_lines(moment)
        self._newest = self._newest | {moment.trial: (moment, self._clock())}

    @contextmanager
    def shown(self) -> Iterator["StudyProgress"]:
        """The table is on the terminal while the block runs, and stays there if that fails after trials began."""
        if not self._console.is_interactive:
            yield self
            return
        # What is printed to stdout goes where the command has sent it, a log.
        with Live(self, console=self._console, refresh_per_second=2, transient=True, redirect_stdout=False) as live:
            try:
                yield self
            except BaseException:
                live.transient = not self._newest
                raise

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The summary and the table, within the width and height that there are."""
        newest = self._newest
        moments = [moment for moment, _ in newest.values()]
        first = min(moments, key=self._rank, default=None)
        best = None if first is None or self._rank(first)[0] else first
        # Before a trial begins too: of nothing, Rich (15.0) prints an empty line whenever it draws.
        yield Text(self._summary(moments, best), no_wrap=True, overflow="ellipsis")
        if not moments:
            return
        shown = self._fitting(moments, max(1, options.size.height - AROUND))
        tried, values = _values(shown, NAME_WIDE if options.max_width >= WIDE else NAME_NARROW)
        rows = [self._cells(*newest[moment.trial], moment is best) for moment in shown]
        rows = [row | {"values": told} for row, told in zip(rows, values, strict=True)]
        yield _table(rows, {"mark": "", "score": self._metric, "values": tried}, options.max_width)
        if len(shown) < len(moments):
            yield Text(f"  and {len(moments) - len(shown)} more", style="dim")

    def _rank(self, moment: TrialMoment) -> tuple[bool, float]:
        if moment.best is None or not math.isfinite(moment.best):
            return True, 0.0
        return False, self._sign * moment.best

    def _fitting(self, moments: Sequence[TrialMoment], room: int) -> list[TrialMoment]:
        """As many as there is room for; always with the best that has ended, or else with the best that runs."""
        running = [moment for moment in moments if moment.status == "running"]
        ended = sorted((moment for moment in moments if moment.status != "running"), key=self._rank)
        if len(running) > room - bool(ended):
            running = sorted(running, key=self._rank)[: max(room - bool(ended), 0)]
        return running + ended[: room - len(running)]

    def _cells(self, moment: TrialMoment, came: float, best: bool) -> dict[str, str]:
        going = self._clock() - came if moment.status == "running" else 0.0
        return {
            "mark": "*" if best else "",
            "trial": moment.trial,
            "values": "",
            "epoch": f"{moment.epoch}/{moment.epochs}",
            "score": _number(moment.score),
            "best": _number(moment.best),
            "time": duration(moment.seconds + going),
            "states": moment.states,
            "status": moment.status,
        }

    def _summary(self, moments: Sequence[TrialMoment], best: TrialMoment | None) -> str:
        count = Counter(moment.status for moment in moments)
        ended = f"  {len(moments) - count['running']} of {self._points} trials ended"
        failed = f" ({count['failed']} failed)" if count["failed"] else ""
        told = [f"{ended}{failed}, {count['running']} running", duration(self._clock() - self._began)]
        if best:
            told.append(f"best {self._metric} {_number(best.best)}")
        states = Counter(moment.states for moment in moments if moment.states)
        if states:
            told.append("states " + ", ".join(f"{kind} by {number}" for kind, number in sorted(states.items())))
        return "  ".join(told)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _values(moments: Sequence[TrialMoment], least: int) -> tuple[str, list[str]]:
    """The searched keys by their last part, and what every trial tries below them."""
    head, lines = "", [""] * len(moments)
    for key in sorted({key for moment in moments for key in moment.values}):
        name, told = key.rsplit(".", 1)[-1], [label(moment.values.get(key, "-")) for moment in moments]
        room = max(min(len(name), least), *(cell_len(one) for one in told))
        name = name if len(name) <= room else f"{name[: room - 1]}…"
        head += set_cell_size(name, room + GAP)
        lines = [line + set_cell_size(one, room + GAP) for line, one in zip(lines, told, strict=True)]
    return head.rstrip(), [line.rstrip() for line in lines]


def _table(rows: Sequence[Mapping[str, str]], heads: Mapping[str, str], width: int) -> Table:
    """One line per row, whatever the width."""
    widths = {name: max(cell_len(row[name]) for row in rows) for name in rows[0]}
    if not widths["states"]:
        del widths["states"]
    widths = {name: max(cells, cell_len(heads.get(name, name))) for name, cells in widths.items()}
    for name in GIVES_WAY:
        rest = sum(widths.values()) - widths["values"] + GAP * (len(widths) - 1)
        if rest + min(widths["values"], LEAST_VALUES) <= width:
            widths["values"] = min(widths["values"], width - rest)
            break
        widths.pop(name, None)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for name, cells in widths.items():
        right = name in ("epoch", "score", "best", "time")
        table.add_column(heads.get(name, name), width=cells, no_wrap=True, justify="right" if right else "left")
    for row in rows:
        style = "bold green" if row["mark"] else "dim" if row["status"] in ("stopped", "failed") else ""
        table.add_row(*(Text(row[name], overflow="ellipsis") for name in widths), style=style)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
