"""A run as it goes: a progress bar on a terminal, a line now and then in a log."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from banjoray.training.loop import Moment

LINES = 10


class RunProgress:
    """Takes the moments of one run; shows them on ``console``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("  epoch {task.fields[epoch]}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("steps  {task.fields[told]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("train", total=None, start=False, epoch="-", told="starting workers")
        self._shown = -1
        self._note = ""

    def __call__(self, moment: Moment) -> None:
        """Show a moment; a note (precision, resumed from where) is shown once."""
        if moment.note and moment.note != self._note:
            self._note = moment.note
            self._console.print(f"  {moment.note}", highlight=False)
        told = f"loss {moment.loss:.3f}  lr {moment.learning_rate:.1e}  {moment.rows_per_s:.0f} rows/s"
        if self._console.is_terminal:
            epoch = f"{moment.epoch}/{moment.epochs}"
            if not self._bar.tasks[0].started:
                self._bar.start_task(self._task)
            self._bar.update(self._task, completed=moment.step, total=moment.steps, epoch=epoch, told=told)
            return
        tenth = math.floor(LINES * moment.step / moment.steps)
        if tenth > self._shown:
            self._shown = tenth
            line = f"  epoch {moment.epoch}/{moment.epochs}  step {moment.step}/{moment.steps}  {told}"
            self._console.print(line, highlight=False)

    @contextmanager
    def shown(self) -> Iterator["RunProgress"]:
        """The bar is on the terminal while the block runs."""
        if not self._console.is_terminal:
            yield self
            return
        with self._bar:
            yield self
