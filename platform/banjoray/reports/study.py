"""A finished search as one HTML page, and its parallel coordinates as a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import fsspec
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from banjoray.reports import charts
from banjoray.reports.charts import Axis, Mark, label
from banjoray.reports.progress import duration
from banjoray.tuning.importance import in_order, logarithmic
from banjoray.tuning.study import StudyResult, Trial


@dataclass(frozen=True)
class Figure:
    """A picture of the page: its title, what to know to read it, the SVG; ``style`` wide and alone take a whole row."""

    title: str
    note: str
    svg: Markup
    style: str = ""


@dataclass(frozen=True)
class Row:
    """A trial in the ranking, as text; ``style`` is the class of its colour."""

    place: str
    trial: str
    values: tuple[str, ...]
    score: str
    epochs: int
    seconds: str
    states: str
    status: str
    style: str


@dataclass(frozen=True)
class _Drawn:
    """What is drawn of a study: trials with a score, the worst first and the winner last, above the others."""

    study: StudyResult
    trials: tuple[Trial, ...]
    names: Mapping[str, str]
    score: Axis


def study_page(study: StudyResult) -> str:
    """One HTML file that needs nothing beside it: winner, ranking, pictures. What has no score is in no picture."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("banjoray.reports").joinpath("study.html.j2").read_text(encoding="utf-8"))
    drawn = _drawn(study)
    names = _names(study.trials)
    winner = [trial for trial in study.trials if trial.trial == study.trial]
    return template.render(
        study=study,
        score=_number(study.score),
        won=[(names[key], label(value)) for trial in winner for key, value in trial.values.items()],
        facts=_facts(study),
        names=names,
        rows=[_row(drawn, place, trial, names) for place, trial in enumerate(study.trials, start=1)],
        figures=_figures(drawn) if drawn.trials else [],
        rules=Markup(charts.RULES),
        light=Markup(charts.colours(charts.LIGHT)),
        dark=Markup(charts.colours(charts.DARK)),
    )


def write_page(study: StudyResult, folder: str) -> str:
    """The page as study.html in a folder or under an fsspec URL; where it is."""
    place = f"{folder.rstrip('/')}/study.html"
    with fsspec.open(place, "w", encoding="utf-8") as file:
        file.write(study_page(study))
    return place


def study_picture(study: StudyResult) -> str:
    """The parallel coordinates as an SVG file, in light colours on white."""
    return _parallel(_drawn(study), alone=True)


def _drawn(study: StudyResult) -> _Drawn:
    scored = [trial for trial in reversed(study.trials) if _finite(trial.score)]
    scored.sort(key=lambda trial: trial.trial == study.trial)
    scores = [trial.score for trial in scored if trial.score is not None]
    axis = replace(charts.number_axis(study.metric, scores or [0.0]), falling=study.mode == "min")
    return _Drawn(study, tuple(scored), _names(scored), axis)


def _names(trials: Sequence[Trial]) -> dict[str, str]:
    """Searched keys and their short names: the last part, where no other key ends in it."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    lasts = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)}


def _finite(number: float | None) -> bool:
    return number is not None and math.isfinite(number)


def _number(number: float | None) -> str:
    return f"{number:.4f}" if number is not None and math.isfinite(number) else "-"


def _facts(study: StudyResult) -> list[tuple[str, str]]:
    trials = study.trials
    early = sum(trial.status == "stopped early" for trial in trials)
    failed = sum(not _finite(trial.score) for trial in trials)
    counts = [f"{len(trials)}", f"{early} stopped early" if early else "", f"{failed} failed" if failed else ""]
    read = sum(trial.prefix == "read" for trial in trials)
    facts = [
        ("trials", ", ".join(count for count in counts if count)),
        ("epochs", str(sum(trial.epochs for trial in trials))),
        ("time in trials", duration(sum(trial.seconds for trial in trials))),
        ("what mattered", "" if study.importances else "too few scores to tell"),
        ("read cached states", f"{read} of {len(trials)} trials" if read else ""),
        ("freed", f"{study.freed_bytes / 2**20:.0f} MiB of checkpoints" if study.freed_bytes else ""),
    ]
    return [(name, told) for name, told in facts if told]


def _row(drawn: _Drawn, place: int, trial: Trial, keys: Mapping[str, str]) -> Row:
    scored = _finite(trial.score)
    return Row(
        str(place) if scored else "-",
        trial.trial,
        tuple(label(trial.values[key]) if key in trial.values else "-" for key in keys),
        _number(trial.score),
        trial.epochs,
        f"{trial.seconds:.1f}",
        trial.prefix or "-",
        trial.status,
        _style(drawn, trial) if scored else "failed",
    )


def _key_axis(name: str, key: str, values: Sequence[Any]) -> Axis:
    if all(isinstance(value, float) for value in values):
        return charts.log_axis(name, values) if logarithmic(values) else charts.number_axis(name, values)
    order = in_order(values)
    return charts.choice_axis(name, sorted(order, key=_depth) if key == "freeze" else order)


def _depth(freeze: Any) -> float:
    """How far up a network is frozen; what is not cut by depth (patterns, bitfit) comes last."""
    match freeze:
        case "none":
            return -2
        case "embeddings":
            return -1
        case {"layers": int(count)}:
            return count
        case "backbone":
            return 1e6
    return math.inf


def _style(drawn: _Drawn, trial: Trial) -> str:
    step = f"s{drawn.score.step(drawn.score.at(trial.score))}"
    return f"{step} won" if trial.trial == drawn.study.trial else step


def _mark(drawn: _Drawn, trial: Trial, points: Sequence[tuple[Any, Any]]) -> Mark:
    values = [f"{drawn.names[key]} {label(value)}" for key, value in trial.values.items()]
    score = f"{drawn.study.metric} {_number(trial.score)}"
    told = ", ".join([score, *values, f"{trial.epochs} epochs", duration(trial.seconds)])
    return Mark(f"trial {trial.trial}: {told}", _style(drawn, trial), tuple(points), trial.seconds)


def _figures(drawn: _Drawn) -> list[Figure]:
    """The pictures that there is something to draw for; the first stands beside the winner if there are importances."""
    figures = []
    better = " Lower is better." if drawn.score.falling else ""
    shares = {drawn.names.get(key, key): share for key, share in drawn.study.importances.items()}
    if shares:
        note = f"Shares of the variance of {drawn.study.metric} over {len(drawn.trials)} trials (fANOVA)."
        figures.append(Figure("What mattered", note, Markup(charts.bars(shares, "importance of each key"))))
    note = f"A line per trial, from its values to its score; the thick one won.{better}"
    figures.append(Figure("What was tried, and what it reached", note, Markup(_parallel(drawn)), "wide"))
    pairs = []
    if any("freeze" in trial.values for trial in drawn.trials):
        longest = duration(max(trial.seconds for trial in drawn.trials))
        note = f"A circle per trial; its area is the time that it took, at most {longest}.{better}"
        pairs.append(Figure("What is frozen, and what it costs", note, Markup(_freeze(drawn))))
    curves = _curves(drawn)
    if curves:
        pairs.append(Figure("Epoch by epoch", f"A line per trial, a dot per epoch.{better}", Markup(curves)))
    return [*figures, *(replace(figure, style="" if len(pairs) == 2 else "alone") for figure in pairs)]


def _parallel(drawn: _Drawn, alone: bool = False) -> str:
    axes = [
        _key_axis(name, key, [trial.values.get(key) for trial in drawn.trials]) for key, name in drawn.names.items()
    ]
    marks = [
        _mark(drawn, trial, list(enumerate([*(trial.values.get(key) for key in drawn.names), trial.score])))
        for trial in drawn.trials
    ]
    return charts.parallel([*axes, drawn.score], marks, alone)


def _freeze(drawn: _Drawn) -> str:
    trials = [trial for trial in drawn.trials if "freeze" in trial.values]
    frozen = _key_axis("frozen", "freeze", [trial.values["freeze"] for trial in trials])
    marks = [_mark(drawn, trial, [(trial.values["freeze"], trial.score)]) for trial in trials]
    return charts.circles(frozen, drawn.score, marks, "score against what is frozen; area: seconds")


def _curves(drawn: _Drawn) -> str:
    """Scores by epoch; empty where no trial kept any."""
    metric = drawn.study.metric
    points = [
        [(entry["epoch"], entry[metric]) for entry in trial.history if metric in entry and math.isfinite(entry[metric])]
        for trial in drawn.trials
    ]
    every = [point for curve in points for point in curve]
    if not every:
        return ""
    epochs = charts.number_axis("epoch", [epoch for epoch, _ in every], least_step=1)
    scores = charts.number_axis(drawn.score.name, [score for _, score in every])
    marks = [_mark(drawn, trial, curve) for trial, curve in zip(drawn.trials, points, strict=True) if curve]
    return charts.lines(epochs, scores, marks, "score by epoch")
