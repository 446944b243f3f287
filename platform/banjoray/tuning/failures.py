"""Why a trial has no score: a point that can't be trained, which costs that trial, or a bug, which ends the study.

What dies without a word (a process, a node) is neither: Tune starts the trial again, and it goes on from its
checkpoint. What does not fit into memory is halved inside the run (`training.loop.fit`).
"""

from dataclasses import dataclass
from typing import Literal

from banjoray.errors import ConfigError, Untrainable


@dataclass(frozen=True)
class Failure:
    """``no_score``: the values can't be trained with; ``bug``: something that would break other trials too."""

    kind: Literal["no_score", "bug"]
    reason: str


def classify(error: Exception) -> Failure:
    """What an error that ended a trial means for the study.

    Untrainable: losses that are no numbers, a row that does not fit into memory. ConfigError: values that do not go
    together (an adapter and a frozen backbone); each alone was checked before the first trial, as rows were. Anything
    else is unreadable data, a full disk, lost workers, or a fault in the program.
    """
    lines = str(error).strip().splitlines()
    reason = lines[-1] if lines else type(error).__name__
    if isinstance(error, Untrainable | ConfigError):
        return Failure("no_score", reason)
    return Failure("bug", f"{type(error).__name__}: {reason}")
