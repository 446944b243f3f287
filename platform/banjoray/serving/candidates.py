"""Whether a version may answer instead of another one: both are asked that one's probe rows, scored and timed."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from banjoray.config.metrics import MINIMISED
from banjoray.config.rollout import Gate
from banjoray.data.probe import read_probe
from banjoray.data.splits import Split
from banjoray.registry import Registry
from banjoray.serving.choosing import timed
from banjoray.serving.engine import Engine
from banjoray.serving.probe import Probe, probe_for


@dataclass(frozen=True)
class Verdict:
    """What was found of ``version`` beside ``against``, which answers; ``why`` it is refused, empty where it is not.

    ``score`` and ``against_score`` are of ``metric`` on the probe ``rows``, ``ms`` and ``against_ms`` of passes over
    the same of them; ``same`` is the share of answers in which they agree, None where those can't be compared.
    """

    version: str
    against: str
    why: str = ""
    rows: int = 0
    metric: str = ""
    score: float | None = None
    against_score: float | None = None
    same: float | None = None
    ms: float | None = None
    against_ms: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compared(
    candidate: Engine,
    live: Engine,
    rows: Split | None,
    gate: Gate,
    times: Callable[[dict[str, Callable[[], object]]], dict[str, float]] = timed,
) -> Verdict:
    """The verdict on a loaded version, by ``rows``: the probe rows of the one that answers."""
    verdict = Verdict(str(candidate.version), str(live.version))
    if why := unlike(candidate, live):
        return replace(verdict, why=why)
    mine, theirs = (_probe(engine, rows) for engine in (candidate, live))
    if mine is None or theirs is None:
        return replace(verdict, why="neither version has probe rows to compare them by; register it again")
    found, wanted = mine.outputs(candidate.model), theirs.outputs(live.model)
    if any(np.isnan(each).any() for each in found):
        return replace(verdict, why="its outputs on the probe rows hold NaN", rows=len(theirs.rows))
    score, needed = (
        float(probe.task.score(outputs, probe.tokens, probe.rows, probe.labels).metrics[theirs.metric])
        for probe, outputs in ((mine, found), (theirs, wanted))
    )
    seconds = times({"mine": lambda: mine.pass_over(candidate.model), "theirs": lambda: theirs.pass_over(live.model)})
    ms, needed_ms = (round(1000 * seconds[who], 2) for who in ("mine", "theirs"))
    return replace(
        verdict,
        why=_worse(theirs.metric, score, needed, gate) or _slower(ms, needed_ms, gate),
        rows=len(theirs.rows),
        metric=theirs.metric,
        score=score,
        against_score=needed,
        same=_agreement(live, found, wanted),
        ms=ms,
        against_ms=needed_ms,
    )


def probe_rows(live: Engine, candidate: Engine, registry: str) -> Split | None:
    """The probe rows of the version that answers, or else of the other one; None where neither has any."""
    store = Registry(registry)
    for engine in (live, candidate):
        if (rows := read_probe(store.fetch(engine.version))) is not None:
            return rows
    return None


def _probe(engine: Engine, rows: Split | None) -> Probe | None:
    return probe_for(rows, engine.task, engine.tokenizer, engine.model.config, engine.job)


def unlike(candidate: Engine, live: Engine) -> str:
    """Why the two can't be asked the same, in words; empty: they can."""
    mine, theirs = (f"{each.version.task} {each.task.problem_type or ''}".strip() for each in (candidate, live))
    if mine != theirs:
        return f"its task is {mine}; needed {theirs}"
    if tuple(candidate.labels) != tuple(live.labels):
        told = [", ".join(engine.labels) or "none" for engine in (candidate, live)]
        return f"its labels are {told[0]}; needed {told[1]}, in this order, which clients know"
    return ""


def _worse(metric: str, score: float, needed: float, gate: Gate) -> str:
    # Of a metric that can be above 1, a share.
    margin = gate.max_drop * max(1.0, abs(needed))
    drop = score - needed if metric in MINIMISED else needed - score
    if drop <= margin:
        return ""
    return f"its {metric} is {score:.4f}, that of production {needed:.4f}; may be worse by {margin:g} (gate.max_drop)"


def _slower(ms: float, needed: float, gate: Gate) -> str:
    if ms <= gate.max_slowdown * needed:
        return ""
    most = f"{gate.max_slowdown:g} times as long (gate.max_slowdown)"
    return f"its passes take {ms:g} ms, those of production {needed:g}; may take {most}"


def _agreement(live: Engine, found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float | None:
    """The share of answers that are the same; None of tasks that write texts, and of rows cut into unlike tokens."""
    if live.task.generates or [each.shape for each in found] != [each.shape for each in wanted]:
        return None
    same = np.concatenate([live.task.same(one, other) for one, other in zip(found, wanted, strict=True)])
    return round(float(same.mean()), 4)
