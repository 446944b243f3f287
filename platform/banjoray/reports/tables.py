"""Scores, confusion and registered models as tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from banjoray.registry import ModelVersion
from banjoray.tasks.task import Score

if TYPE_CHECKING:
    from rich.console import RenderableType

    from banjoray.cluster.deploy import Deployed
    from banjoray.training.preflight import Ready
    from banjoray.tuning.footprint import Memory
    from banjoray.tuning.plan import Frozen, Plan


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Metrics in one line, in their own order."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def deployed_lines(found: "Deployed") -> list[str]:
    """Who answers now, and what every replica found of a version that it had not held."""
    lines = []
    for verdict in found.verdicts:
        worth = f"{verdict['metric']} {verdict['score']:.4f} (production {verdict['against_score']:.4f})"
        same = "" if verdict["same"] is None else f", {verdict['same']:.1%} of answers the same"
        times = f"{verdict['ms']:g} ms (production {verdict['against_ms']:g})"
        lines.append(f"{verdict['version']}: {worth}{same}, {times} on {verdict['rows']} probe rows")
    roles = ", ".join(f"{role} {held}" for role, held in found.rollout.references.items())
    return [*lines, f"{roles}; in every replica after {found.swap_s:.2f} s (before: {found.before['production']})"]


def score_tables(score: Score) -> "list[RenderableType]":
    """What a score says of its labels: each one by itself, and which were taken for which."""
    tables: list[RenderableType] = [_labels_table(score.per_label)] if score.per_label else []
    return [*tables, confusion_table(score)] if score.confusion else tables


def _labels_table(per_label: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("label")
    for column in next(iter(per_label.values())):
        table.add_column(column, justify="right")
    for label, told in per_label.items():
        cells = (f"{value:.0f}" if name == "support" else f"{value:.4f}" for name, value in told.items())
        table.add_row(Text(label), *cells)
    return table


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
    """Trials by falling score: what each tried, how long it ran, what it reached, what became of kept states."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("", "trial", "values", "epochs", metric, "seconds", "states"):
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
        took = f"{trial['seconds']:.0f}"
        prefix = str(trial["prefix"] or "-")
        table.add_row(str(place), str(trial["trial"]), told, str(trial["epochs"]), shown, took, prefix)
    return table


def importances_line(importances: Mapping[str, float], freed_bytes: int) -> str:
    """How much each searched key mattered, and what trials that fell behind took on disk; empty if there is neither."""
    shares = ", ".join(f"{key} {share:.0%}" for key, share in importances.items())
    told = [f"mattered    {shares}"] if shares else []
    if freed_bytes:
        told.append(f"freed       {freed_bytes / 2**20:.0f} MiB of checkpoints")
    return "\n".join(told)


def checked_line(ready: "Ready", corners: int) -> str:
    """What was found of a job that can run; ``corners`` counts the values of its space that were looked at."""
    rows = f"{len(ready.splits.train)} train and {len(ready.splits.validation)} validation rows"
    searched = f", {corners} values of tune.space" if corners else ""
    labels = f"{len(ready.splits.labels)} labels"
    return f"ok, {rows}, {labels}, {ready.trainable} of {ready.weights} weights trained{searched}"


def plan_lines(plan: "Plan") -> "list[RenderableType]":
    """What a job will take: counts, memory by strategy and, where it has a frozen bottom or a choice, each freeze."""
    work, disk, study = plan.work, plan.disk, plan.study
    facts = Table.grid(padding=(0, 2))
    facts.add_row("rows", f"{work.train_rows:,} train, {work.validation_rows:,} validation, {work.labels} labels")
    longest = f"longest row {work.longest_row}, {work.rows_cut:,} rows cut"
    facts.add_row("tokens", f"{work.tokens_per_epoch:,} per epoch, {longest}, {work.padding:.1%} padding")
    facts.add_row("steps", f"{work.steps_per_epoch:,} per epoch, {work.steps:,} in all")
    facts.add_row("weights", f"{plan.weights:,}, trained {plan.trained:,} (of the word table, the words in use)")
    run = f"checkpoint {_bytes(disk.checkpoint_bytes)}, run {_bytes(disk.run_bytes)}"
    facts.add_row("disk", f"{run}, tokens {_bytes(disk.tokens_bytes)}")
    if disk.prefix_bytes:
        facts.add_row("", f"kept states {_bytes(disk.prefix_bytes)}")
    if disk.free_bytes is not None:
        facts.add_row("free disk", _bytes(disk.free_bytes))
    if study:
        waves = f"{study.at_once} at a time on this machine, {study.waves} waves"
        facts.add_row("trials", f"{study.trials}, {waves}, up to {_bytes(study.disk_bytes)} of checkpoints")
    of, kept = f"one of {plan.workers} workers" if plan.workers > 1 else "the worker", plan.activations
    note = (
        f"an estimate for {of} in {plan.precision}; * is the job's own\n"
        f"activations: {kept.rows} rows x {kept.tokens} tokens x {kept.width} wide x {kept.numbers:.0f} numbers "
        f"({kept.blocks} blocks above the frozen bottom) x {kept.bytes_per_number} bytes"
    )
    frozen = [_freezes_table(plan.freezes)] if len(plan.freezes) > 1 or plan.freezes[0].depth is not None else []
    return [facts, memory_table(plan.memory), note, *frozen]


def memory_table(rows: "Sequence[Memory]") -> Table:
    """GiB by strategy and part; the job's own strategy is marked."""
    columns = ["weights", "gradients", "optimizer", "buffers", "activations", "total"]
    if not any(row.buffers_gib for row in rows):
        columns.remove("buffers")
    table = Table(box=SIMPLE_HEAD)
    table.add_column("GiB")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        cells = [f"{getattr(row, f'{column}_gib'):.3f}" for column in columns]
        table.add_row(f"{row.strategy}{' *' * row.chosen}", *cells, style="bold" if row.chosen else None)
    return table


def _freezes_table(rows: "Sequence[Frozen]") -> Table:
    table = Table(box=SIMPLE_HEAD)
    for column in ("freeze", "trained", "checkpoint", "bottom"):
        table.add_column(column, overflow="fold")
    table.add_column("its states, as expected")
    for row in rows:
        kept = f"{_bytes(row.prefix_bytes)}: {row.reason}" if row.keep else f"not kept: {row.reason}"
        freeze = row.freeze if isinstance(row.freeze, str) else ", ".join(f"{k}: {v}" for k, v in row.freeze.items())
        depth = "-" if row.depth is None else f"{row.depth} blocks"
        table.add_row(f"{freeze}{' *' * row.chosen}", f"{row.trained:,}", _bytes(row.checkpoint_bytes), depth, kept)
    return table


def _bytes(size: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 2**10:.1f} KiB"


def _short(value: object) -> str:
    return f"{value:.2e}" if isinstance(value, float) else str(value)
