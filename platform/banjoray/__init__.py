"""banjoray: one job file from raw text to an HTTP answer.

The Python API is the command line's: ``banjoray.train(job)`` is ``banjoray train job.yaml``.
Names are loaded when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from banjoray.config.job import JobConfig, load_job
    from banjoray.data.frames import with_rows
    from banjoray.registry import ModelVersion, Registry
    from banjoray.training.run import RunResult, score, train
    from banjoray.tuning.run import tune
    from banjoray.tuning.study import StudyResult

_HOMES = {
    "JobConfig": "banjoray.config.job",
    "load_job": "banjoray.config.job",
    "ModelVersion": "banjoray.registry",
    "Registry": "banjoray.registry",
    "RunResult": "banjoray.training.run",
    "score": "banjoray.training.run",
    "train": "banjoray.training.run",
    "StudyResult": "banjoray.tuning.study",
    "tune": "banjoray.tuning.run",
    "with_rows": "banjoray.data.frames",
}

__all__ = [
    "JobConfig",
    "ModelVersion",
    "Registry",
    "RunResult",
    "StudyResult",
    "load_job",
    "score",
    "train",
    "tune",
    "with_rows",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'banjoray' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
