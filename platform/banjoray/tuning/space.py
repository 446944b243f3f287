"""The search space of a job: every value it can draw, checked before a trial starts."""

import math
from collections.abc import Iterator
from typing import Any

from banjoray.config.job import JobConfig
from banjoray.config.search import Dimension, SearchConfig
from banjoray.errors import ConfigError

# Keys whose values decide whether a model can be cut or a row be read; each choice is prepared in full.
STRUCTURAL = ("freeze", "model", "data")
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


def _corners(dimension: Dimension) -> list[Any]:
    bounds = dimension.loguniform or dimension.uniform
    if not bounds:
        return list(dimension.choice or [])
    low, high = bounds
    # Between them too: 8.0 and 32.0 pass for whole numbers, and hardly anything that is drawn does.
    return [low, high, low + (high - low) / math.pi]
