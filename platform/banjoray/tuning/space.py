"""The search space of a job: every value it can draw, checked before a trial starts."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from banjoray.config.job import JobConfig
from banjoray.config.search import Dimension, SearchConfig
from banjoray.errors import ConfigError

# Keys whose values decide whether a model can be cut or a row be read; each choice is prepared in full.
STRUCTURAL = ("freeze", "adapter", "model", "data")
# What all trials of a study have in common: how they are compared, where they run and are kept.
FIXED = ("tune", "storage", "registry", "hub", "name", "task", "scale", "train.metric", "train.mode")


def search_of(job: JobConfig) -> SearchConfig:
    """The job's search; raises ConfigError if it has none."""
    if job.tune is None:
        raise ConfigError(f"{job.name}: key 'tune' is missing; banjoray tune needs tune.space (see jobs/tune_*.yaml)")
    return job.tune


def corner_jobs(job: JobConfig) -> Iterator[tuple[str, JobConfig]]:
    """Jobs at the ends of every range and at every choice, one key at a time, with the key.

    Raises ConfigError where one is not a valid job, or where a key can't be searched.
    """
    for key, dimension in search_of(job).space.items():
        if key.split(".")[0] in FIXED or key in FIXED:
            raise ConfigError(f"tune.space: '{key}' can't be searched; it does not change what a model learns")
        for value in _corners(dimension):
            try:
                yield key, job.with_values({key: value})
            except ConfigError as error:
                raise ConfigError(f"tune.space: {error}") from None


def at_once(job: JobConfig, cpus: int, gpus: int) -> int:
    """How many trials run at the same time on so much: as asked, but never more than fit.

    Worker groups that found no room would wait for each other for ever.
    """
    search, scale = search_of(job), job.scale
    fits = cpus // (scale.least_workers * scale.cpus_per_worker)
    if scale.gpus_per_worker:
        fits = min(fits, gpus // (scale.least_workers * scale.gpus_per_worker))
    return max(1, min(search.points, fits if search.concurrent == "auto" else min(search.concurrent, fits)))


def told_values(job: JobConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """A point of the space as the job reads it: 5e-05 is a text in YAML, and a number where a number is needed."""
    drawn = job.with_values(values).to_json()

    def read(key: str, value: Any) -> Any:
        found: Any = drawn
        for part in key.split("."):
            found = found[part]
        return found if isinstance(found, int | float) else value

    return {key: read(key, value) if isinstance(value, str) else value for key, value in values.items()}


def _corners(dimension: Dimension) -> list[Any]:
    bounds = dimension.loguniform or dimension.uniform
    if not bounds:
        return list(dimension.choice or [])
    low, high = bounds
    # Between them too: 8.0 and 32.0 pass for whole numbers, and hardly anything that is drawn does.
    return [low, high, low + (high - low) / math.pi]
