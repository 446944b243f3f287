"""What people see of a search while it goes on: a table that fits a terminal, or a line per epoch in a log."""

import contextlib
import io
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.errors import ConfigError
from banjoray.reports.study_progress import AROUND, StudyProgress
from banjoray.tuning.study import TrialMoment

SPACE = {"train.learning_rate": {"loguniform": [1e-5, 1e-3]}, "freeze": {"choice": ["none", {"layers": 2}]}}


def job(metric: str = "loss") -> JobConfig:
    """A search of 20 points by the loss, or by a metric of which more is better."""
    tree = {
        "name": "seen",
        "task": "text-classification",
        "data": {"source": "banjoray:emotion"},
        "train": {"metric": metric, "mode": "min" if metric == "loss" else "max"},
        "tune": {"space": SPACE, "trials": 20},
    }
    return validate(JobConfig, tree, "test job")


def trial(number: int, status: str = "running", best: float | None = None, **changes: object) -> TrialMoment:
    """A moment of a trial that has finished 2 of 3 epochs."""
    usual = {
        "trial": f"ab12c_{number:05d}",
        "values": {"train.learning_rate": number * 1e-4, "freeze": {"layers": 2}},
        "epochs": 3,
        "epoch": 2,
        "score": None if best is None else best + 0.5,
        "best": best,
        "seconds": 60.0 + number,
        "states": "read",
        "status": status,
    }
    return TrialMoment(**usual | changes)  # type: ignore[arg-type]


class Clock:
    """A clock that stands until it is set."""

    now = 1000.0

    def __call__(self) -> float:
        """What it shows."""
        return self.now


def terminal(width: int = 120, height: int = 24) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drawn(progress: StudyProgress, console: Console) -> list[str]:
    """The lines of the table now."""
    with console.capture() as capture:
        console.print(progress)
    return [line.rstrip() for line in capture.get().splitlines()]


def seen(moments: list[TrialMoment], width: int = 120, height: int = 24, metric: str = "loss") -> list[str]:
    console = terminal(width, height)
    progress = StudyProgress(console, job(metric), Clock())
    for moment in moments:
        progress(moment)
    return drawn(progress, console)


STUDY = [
    trial(1, "done", 0.25, states="computed"),
    trial(2, "failed", reason="loss is nan at step 3"),
    trial(3, "stopped", 0.75, epoch=1),
    trial(4, "running", 0.5),
    trial(5, "running", epoch=0, states=""),
]


def test_a_wide_terminal_gets_every_trial_with_all_that_is_known_of_it() -> None:
    assert seen(STUDY) == [
        "  3 of 20 trials ended (1 failed), 2 running  0s  best loss 0.2500  states computed by 1, read by 3",
        "   trial        freeze    learning_rate  epoch    loss    best   time  states    status",
        "─" * 88,
        "   ab12c_00004  layers 2  4e-4             2/3  1.0000  0.5000  1m04s  read      running",
        "   ab12c_00005  layers 2  5e-4             0/3       -       -  1m05s            running",
        "*  ab12c_00001  layers 2  1e-4             2/3  0.7500  0.2500  1m01s  computed  done",
        "   ab12c_00003  layers 2  3e-4             1/3  1.2500  0.7500  1m03s  read      stopped",
        "   ab12c_00002  layers 2  2e-4             2/3       -       -  1m02s  read      failed",
    ]


@pytest.mark.parametrize(
    ("width", "head"),
    [
        (80, "   trial        freeze    learnin…  epoch    best   time  states    status"),
        (60, "   trial        freeze    learnin…  epoch    best  status"),
        (40, "   trial        epoch    best  status"),
    ],
)
def test_a_narrow_terminal_goes_without_columns_and_breaks_no_line(width: int, head: str) -> None:
    lines = seen(STUDY, width)
    assert lines[1] == head
    assert len(lines) == 3 + len(STUDY)
    assert max(cell_len(line) for line in lines) <= width
    assert "…" not in "".join(lines[2:])
    for moment, line in zip([STUDY[3], STUDY[4], STUDY[0], STUDY[2], STUDY[1]], lines[3:], strict=True):
        assert moment.trial in line
        assert line.endswith(moment.status)
    assert lines[5].startswith("*  ab12c_00001")


def test_long_values_are_cut_and_nothing_else_is() -> None:
    values = {"model.base": "sentence-transformers/all-MiniLM-L6-v2", "train.batch_size": 32}
    line = seen([trial(1, "done", 0.25, values=values)], 80)[-1]
    assert line == "*  ab12c_00001  sentence-transformers/all…    2/3  0.2500  1m01s  read    done"


def test_without_a_frozen_bottom_there_is_no_column_of_states() -> None:
    summary, head, *_ = seen([trial(1, "done", 0.25, states="")])
    assert "states" not in summary + head


@pytest.mark.parametrize(("metric", "best"), [("loss", 1), ("accuracy", 3)])
def test_the_star_stands_at_the_best_in_the_sense_of_the_job(metric: str, best: int) -> None:
    stars = [line for line in seen(STUDY, metric=metric) if line.startswith("*")]
    assert [line.split()[1] for line in stars] == [f"ab12c_{best:05d}"]


def test_the_star_moves_to_a_running_trial_that_is_better() -> None:
    lines = seen([*STUDY, trial(5, "running", 0.125)])
    assert [line.split()[1] for line in lines if line.startswith("*")] == ["ab12c_00005"]
    assert "best loss 0.1250" in lines[0]


def test_a_score_that_is_no_number_is_never_the_best() -> None:
    lines = seen([trial(1, "done", float("nan")), trial(2, "done", 0.5)])
    assert [line.split()[1] for line in lines if line.startswith("*")] == ["ab12c_00002"]


def test_the_newest_moment_of_a_trial_takes_the_place_of_the_one_before() -> None:
    going = [trial(1, "running", 0.75, epoch=1), trial(1, "running", 0.5, epoch=2)]
    assert " 2/3  1.0000  0.5000 " in seen(going)[3]
    *_, head, rule, line = seen([*going, trial(1, "done", 0.25, epoch=3)])
    assert (head.split()[0], set(rule)) == ("trial", {"─"})
    assert " ".join(line.split()) == "* ab12c_00001 layers 2 1e-4 3/3 0.7500 0.2500 1m01s read done"


@pytest.mark.parametrize("height", [6, 10, 24, 60])
def test_the_table_never_passes_the_height_and_keeps_those_that_run_and_the_best(height: int) -> None:
    ended = [trial(number, "done", 1.0 / number) for number in range(1, 31)]
    moments = [*ended, trial(31, "running", 0.9), trial(32, "running")]
    lines = seen(moments, height=height)
    rows = [line.removeprefix("*").split()[0] for line in lines[3:] if "ab12c" in line]
    best_first = [f"ab12c_{number:05d}" for number in (31, 32, *range(30, 0, -1))]
    room = min(height - AROUND, len(moments))
    assert rows == (best_first[:room] if room > 2 else ["ab12c_00030"])
    assert len(lines) < height
    assert (lines[-1] == f"  and {len(moments) - room} more") == (room < len(moments))
    assert [line.split()[1] for line in lines if line.startswith("*")] == ["ab12c_00030"]


def test_more_trials_that_run_than_there_are_lines_leave_a_line_to_the_best() -> None:
    running = [trial(number, "running", 1.0 / number) for number in range(2, 30)]
    *_, a, b, c, d, last, more = seen([trial(1, "done", 0.015625), trial(30, "done", 0.5), *running], height=10)
    assert [line.split()[0] for line in (a, b, c, d)] == [f"ab12c_{number:05d}" for number in (29, 28, 27, 26)]
    assert last.startswith("*  ab12c_00001 ")
    assert more == "  and 25 more"


def test_the_time_of_a_trial_that_runs_goes_on_from_its_own_and_stands_when_it_has_ended() -> None:
    console, clock = terminal(), Clock()
    progress = StudyProgress(console, job(), clock)
    progress(trial(1, "running", 0.5, seconds=10.0))
    progress(trial(2, "done", 0.5, seconds=20.0))
    clock.now += 7
    summary, *_, first, second = drawn(progress, console)
    assert summary.startswith("  1 of 20 trials ended, 1 running  7s  ")
    assert " 17s " in first
    assert " 20s " in second


def test_before_a_trial_begins_there_is_a_line_to_draw_over() -> None:
    console = terminal()
    with StudyProgress(console, job(), Clock()).shown():
        pass
    assert seen([]) == ["  0 of 20 trials ended, 0 running  0s"]
    # Every empty picture would be a line further down.
    assert written(console).count("\n") <= 1


def test_an_error_before_the_first_trial_leaves_no_table_above_it() -> None:
    console = terminal()
    with pytest.raises(ConfigError), StudyProgress(console, job(), Clock()).shown():
        raise ConfigError("no rows")
    assert written(console).endswith("\x1b[2K")


def test_the_table_is_on_the_terminal_while_a_study_runs_and_wiped_off_at_its_end() -> None:
    console = terminal()
    with StudyProgress(console, job(), Clock()).shown() as watch:
        watch(trial(1, "done", 0.25))
    text = written(console)
    assert "ab12c_00001" in text
    # The last thing that a terminal gets is to erase lines.
    assert "\x1b[2K" in text[text.rindex("ab12c_00001") :]


def test_what_libraries_print_goes_where_stdout_was_sent_and_not_between_the_lines_of_the_table() -> None:
    console, log = terminal(), io.StringIO()
    with contextlib.redirect_stdout(log), StudyProgress(console, job(), Clock()).shown():
        print("noise")  # noqa: T201
    assert log.getvalue() == "noise\n"
    assert "noise" not in written(console)


def test_the_table_of_a_study_that_fails_stays_and_its_error_passes() -> None:
    console = terminal()
    with pytest.raises(KeyboardInterrupt), StudyProgress(console, job(), Clock()).shown() as watch:  # noqa: PT012
        watch(trial(1, "running", 0.25))
        raise KeyboardInterrupt
    text = written(console)
    assert "\x1b[2K" not in text[text.rindex("ab12c_00001") :]


def test_why_a_trial_failed_is_told_in_full_above_the_table() -> None:
    console, reason = terminal(60), "loss is nan and the gradients' norm [nan] at step 3; " * 3
    StudyProgress(console, job(), Clock())(trial(2, "failed", reason=reason))
    assert written(console).splitlines() == [f"  trial ab12c_00002  failed: {reason}"]


LOG = [
    trial(1, "running", epoch=0),
    trial(1, "running", 0.25, epoch=1),
    trial(1, "running", 0.25, epoch=2),
    trial(1, "done", 0.25),
    trial(2, "failed", reason="loss is nan at step 3"),
    trial(3, "stopped", 0.5),
    trial(4, "done", 0.5, earlier=True),
    trial(5, "failed", reason="long ago", earlier=True),
]
LINES = [
    "  trial ab12c_00001  epoch 1  loss 0.7500  (train.learning_rate 1.00e-04, freeze {'layers': 2})",
    "  trial ab12c_00001  epoch 2  loss 0.7500  (train.learning_rate 1.00e-04, freeze {'layers': 2})",
    "  trial ab12c_00002  failed: loss is nan at step 3",
]


@pytest.mark.parametrize("width", [20, 80])
def test_a_log_gets_a_line_per_epoch_and_per_failure_and_nothing_else(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    with StudyProgress(console, job(), Clock()).shown() as watch:
        for moment in LOG:
            watch(moment)
    assert written(console).splitlines() == LINES


def test_the_command_draws_no_table_into_a_file_whose_colours_are_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from banjoray.terminal import terminal

    monkeypatch.setenv("FORCE_COLOR", "1")
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        monkeypatch.setattr("sys.stderr", file)
        console = terminal()
        with StudyProgress(console, job(), Clock()).shown() as watch:
            for moment in LOG:
                watch(moment)
    assert (tmp_path / "log").read_text(encoding="utf-8").splitlines() == LINES
