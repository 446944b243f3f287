"""From a trained folder to a registered version: past its gate, and only if it scores afresh what the run measured."""

from collections.abc import Callable, Mapping
from importlib.metadata import version as installed
from pathlib import Path

from banjoray.config.job import JobConfig
from banjoray.config.metrics import MINIMISED
from banjoray.data.probe import write_probe
from banjoray.errors import BrokenVersion, GateRefused
from banjoray.registry import ModelVersion, Registry
from banjoray.tasks.task import Score
from banjoray.training.interface import FitResult
from banjoray.training.preflight import Ready

# A registered folder, loaded afresh, may differ from the run's own measurement by this much in any metric (of one
# above 1, as a perplexity is, by this share of it): another batch shape rounds differently, which can turn a row that
# sits on the fence.
TOLERANCE = 2e-3


def gate_and_register(
    job: JobConfig,
    ready: Ready,
    folder: Path,
    result: FitResult,
    origin: Mapping[str, str | None],
    score: Callable[[Path], Score],
) -> ModelVersion:
    """A registered version of a run's best model, whose Hugging Face folder is ``folder``.

    ``score`` loads a folder afresh and scores it on the validation rows. The version has registry.probe_rows of these
    beside its weights, but for a task that writes texts. Raises GateRefused, BrokenVersion.
    """
    gate, measured = job.registry.gate, result.checkpoint.metrics
    found, most = measured[gate.metric], gate.at_most
    if gate.metric in MINIMISED:
        refused, needed = most is not None and not found <= most, f"at most {most}"
    else:
        refused, needed = not found >= gate.at_least, f"at least {gate.at_least}"
    if refused:
        raise GateRefused(
            f"registry.gate: {gate.metric} is {found:.4f}, needed {needed}; not registered. "
            f"The model stays in {folder}."
        )

    if not ready.task.generates:
        write_probe(ready.splits.validation, job.registry.probe_rows, folder)

    def verify(staged: Path) -> dict[str, float]:
        scored = score(staged)
        for metric, value in measured.items():
            if abs(scored.metrics[metric] - value) > TOLERANCE * max(1.0, abs(value)):
                raise BrokenVersion(
                    f"{staged} scores {metric} {scored.metrics[metric]:.5f} when loaded afresh, the run measured "
                    f"{value:.5f}; not registered"
                )
        return scored.metrics

    return Registry(job.registry.root).register(
        job.model_name,
        folder,
        task=job.task,
        labels=ready.splits.labels,
        lineage=dict(origin)
        | {
            "data": ready.fingerprint,
            "base": job.model.base,
            "base_digest": ready.base.digest,
            "frozen": result.checkpoint.frozen,
            "job": job.digest(),
            "code": f"banjoray {installed('banjoray')}",
            "precision": result.precision,
        },
        verify=verify,
    )
