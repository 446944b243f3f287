"""Scores, confusion and registered models as tables for a terminal."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from banjoray.registry import ModelVersion
from banjoray.tasks.task import Score


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Metrics in one line, in their own order."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def confusion_table(score: Score) -> Table:
    """Rows are the true labels, columns the answers; the diagonal is right."""
    table = Table(box=SIMPLE_HEAD, title="true label (row) and answer (column)", title_justify="left")
    table.add_column("")
    for label in score.labels:
        table.add_column(label, justify="right")
    table.add_column("right", justify="right")
    for number, counts in enumerate(score.confusion):
        cells = [_cell(count, number == column) for column, count in enumerate(counts)]
        share = f"{counts[number] / sum(counts):.0%}" if sum(counts) else "-"
        table.add_row(score.labels[number], *cells, share)
    return table


def _cell(count: int, right: bool) -> str:
    if not count:
        return "[dim].[/dim]"
    return f"[bold green]{count}[/bold green]" if right else str(count)


def profile_table(profile: Mapping[str, float]) -> Table:
    """Where the time of a run went: seconds and share of every phase, the longest first."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("phase")
    for column in ("seconds", "share"):
        table.add_column(column, justify="right")
    total = sum(profile.values())
    for phase, seconds in sorted(profile.items(), key=lambda entry: -entry[1]):
        table.add_row(phase, f"{seconds:.1f}", f"{seconds / total:.1%}" if total else "-")
    table.add_section()
    table.add_row("all", f"{total:.1f}", "")
    return table


def versions_table(versions: Sequence[ModelVersion], aliases: Mapping[str, int]) -> Table:
    """One line per version: where aliases point, what it scored, where it came from."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("version", "alias", "metrics", "run", "trial", "created"):
        table.add_column(column, overflow="fold")
    for version in versions:
        held = ", ".join(alias for alias, number in aliases.items() if number == version.version)
        origin = [str(version.lineage.get(key) or "-") for key in ("run", "trial")]
        table.add_row(str(version), held or "-", metrics_line(version.metrics), *origin, version.created)
    return table


def trials_table(trials: Sequence[Mapping[str, object]], metric: str) -> Table:
    """Trials by falling score: what each tried, how long it ran, what it reached."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("", "trial", "values", "epochs", metric, "seconds"):
        table.add_column(column, overflow="fold")
    for place, trial in enumerate(trials, start=1):
        values = trial["values"]
        told = (
            ", ".join(f"{k.rsplit('.', 1)[-1]} {_short(v)}" for k, v in values.items())
            if isinstance(values, dict)
            else ""
        )
        score = trial["score"]
        shown = f"{score:.4f}" if isinstance(score, float) else str(trial["status"])
        table.add_row(str(place), str(trial["trial"]), told, str(trial["epochs"]), shown, f"{trial['seconds']:.0f}")
    return table


def _short(value: object) -> str:
    return f"{value:.2e}" if isinstance(value, float) else str(value)
