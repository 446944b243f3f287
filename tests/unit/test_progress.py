"""What people see of a run: how fast it learns, what it pads, how long it still takes, and where its time went."""

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from banjoray.reports.progress import LINES, RunProgress, duration
from banjoray.reports.tables import profile_table
from banjoray.training.interface import Moment


def moment(step: int, steps: int = 100, note: str = "") -> Moment:
    return Moment(
        step, steps, epoch=1, epochs=3, loss=0.1234, learning_rate=2e-5, rows_per_s=350.4, padding=0.061, note=note
    )


def ticks(seconds: float) -> Iterator[float]:
    """A clock that goes on by ``seconds`` at every look."""
    now = 1000.0
    while True:
        yield now
        now += seconds


def lines_of(moments: list[Moment], seconds: float = 2.0) -> list[str]:
    """What a log gets of a run whose steps take ``seconds`` each."""
    console = Console(file=io.StringIO(), width=40)
    clock = ticks(seconds)
    progress = RunProgress(console, lambda: next(clock))
    with progress.shown() as shown:
        for one in moments:
            shown(one)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_log_gets_loss_rate_speed_padding_and_the_time_left() -> None:
    line = lines_of([moment(step) for step in range(1, 61)])[-1]
    assert line == "  epoch 1/3  step 60/100  loss 0.123  lr 2.0e-05  350 rows/s  pad 6 %  left 1m20s"


def test_a_log_gets_few_lines_whatever_the_number_of_steps() -> None:
    for steps in (3, 10, 1000):
        lines = lines_of([moment(step, steps) for step in range(1, steps + 1)])
        assert len(lines) <= LINES + 1
        assert f"step {steps}/{steps}" in lines[-1]
        assert lines[-1].endswith("left 0s")


def test_the_time_left_of_a_resumed_run_is_measured_from_where_it_went_on() -> None:
    first, *_, last = lines_of([moment(step) for step in range(51, 91)])
    assert "left" not in first
    assert last.endswith("step 90/100  loss 0.123  lr 2.0e-05  350 rows/s  pad 6 %  left 20s")


def test_a_note_is_shown_once() -> None:
    lines = lines_of([moment(step, note="precision fp32: no GPU") for step in range(1, 101)])
    assert lines.count("  precision fp32: no GPU") == 1


def test_what_is_added_to_a_note_is_shown_alone() -> None:
    first = "precision fp32: no GPU"
    notes = ["", first, f"{first}; [wandb] failed; the run goes on", f"{first}; [wandb] failed; the run goes on", ""]
    lines = lines_of([moment(step, note=note) for step, note in enumerate(notes, start=1)])
    assert [line for line in lines if "step" not in line] == [f"  {first}", "  [wandb] failed; the run goes on"]


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_a_bar_with_the_same_numbers_and_a_time_left(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    progress = RunProgress(console)
    for step in (51, 52, 53):
        progress(moment(step))
    with console.capture() as capture:
        console.print(progress._bar.get_renderable())
    shown = " ".join(capture.get().split())
    assert shown.startswith("epoch 1/3 ")
    assert " 53/100 loss 0.123 lr 2.0e-05 350 rows/s pad 6 % " in shown
    assert shown[-5:-3].isdigit()
    assert shown[-3] == ":"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (80, "1m20s"), (3599.9, "1h00m"), (7500, "2h05m"), (360000, "100h00m")],
)
def test_durations_read_as_people_say_them(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def cells(profile: dict[str, float]) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(profile_table(profile))
    assert isinstance(console.file, io.StringIO)
    return [line.split() for line in console.file.getvalue().splitlines() if line.strip(" ─")]


def test_a_profile_is_told_longest_phase_first_with_its_share() -> None:
    assert cells({"collate": 1.0, "backward": 6.0, "forward": 3.0, "exchange": 0.0}) == [
        ["phase", "seconds", "share"],
        ["backward", "6.0", "60.0%"],
        ["forward", "3.0", "30.0%"],
        ["collate", "1.0", "10.0%"],
        ["exchange", "0.0", "0.0%"],
        ["all", "10.0"],
    ]


def test_a_profile_of_no_time_has_no_shares() -> None:
    assert cells({"forward": 0.0}) == [["phase", "seconds", "share"], ["forward", "0.0", "-"], ["all", "0.0"]]
