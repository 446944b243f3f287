"""A run as it goes: a progress bar on a terminal, a line now and then in a log."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from banjoray.training.interface import Moment

LINES = 10


class RunProgress:
    """Takes the moments of one run; shows them on ``console``. ``clock`` counts seconds."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        # The first moment, and when it came: speed is measured from there, as a resumed run begins in the middle.
        self._first: tuple[int, float] | None = None
        # On a narrow terminal the bar gives way, not the numbers.
        self._bar = Progress(
            TextColumn("  epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("train", total=None, start=False, epoch="-", told="starting workers")
        self._shown = -1
        self._note = ""

    def __call__(self, moment: Moment) -> None:
        """Show a moment; a note (precision, resumed from where) is shown once, and of a longer one what is new."""
        new = moment.note.removeprefix(self._note).removeprefix("; ")
        if new:
            self._note = moment.note
            self._console.print(f"  {new}", highlight=False, markup=False, soft_wrap=True)
        told = f"loss {moment.loss:.3f}  lr {moment.learning_rate:.1e}  {moment.rows_per_s:.0f} rows/s"
        told += f"  pad {moment.padding * 100:.0f} %"
        left = self._left(moment)
        if self._console.is_terminal:
            epoch = f"{moment.epoch}/{moment.epochs}"
            if not self._bar.tasks[0].started:
                self._bar.start_task(self._task)
            self._bar.update(self._task, completed=moment.step, total=moment.steps, epoch=epoch, told=told)
            return
        tenth = math.floor(LINES * moment.step / moment.steps)
        if tenth > self._shown:
            self._shown = tenth
            line = f"  epoch {moment.epoch}/{moment.epochs}  step {moment.step}/{moment.steps}  {told}{left}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _left(self, moment: Moment) -> str:
        """The time that the steps left will take at the speed so far; nothing before a second step was seen."""
        now = self._clock()
        if self._first is None:
            self._first = (moment.step, now)
        step, began = self._first
        if moment.step <= step:
            return ""
        return f"  left {duration((now - began) / (moment.step - step) * (moment.steps - moment.step))}"

    @contextmanager
    def shown(self) -> Iterator["RunProgress"]:
        """The bar is on the terminal while the block runs."""
        if not self._console.is_terminal:
            yield self
            return
        with self._bar:
            yield self


def duration(seconds: float) -> str:
    """Seconds for people: 45s, 1m20s, 2h05m.

    >>> duration(80)
    '1m20s'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
