"""What a trial has done, written beside its checkpoints: what the driver tells of it, and what is not done twice.

Tune's own record of a study is some seconds old when a driver is killed. A trial that is started again because of that
finds its record here, reports what it had reported, and trains only what is left.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import fsspec

from banjoray.tuning.failures import Failure

FILE = "trial.json"


@dataclass(frozen=True)
class Record:
    """``history`` has an entry per finished epoch; ``done``: nothing is left to train; ``seconds`` over all starts."""

    history: tuple[dict[str, float], ...] = ()
    seconds: float = 0.0
    prefix: str = ""
    done: bool = False
    failure: Failure | None = None

    def with_epoch(self, entry: dict[str, float]) -> "Record":
        """With one more epoch; one that is there already (its checkpoint was torn) is replaced."""
        kept = tuple(old for old in self.history if old["epoch"] < entry["epoch"])
        return replace(self, history=(*kept, entry))

    def save(self, folder: str) -> None:
        """Write it into a trial's folder (a path or URL), in one step."""
        filesystem, path = fsspec.core.url_to_fs(folder)
        filesystem.makedirs(path, exist_ok=True)
        filesystem.pipe_file(f"{path}/.{FILE}", json.dumps(asdict(self)).encode())
        filesystem.mv(f"{path}/.{FILE}", f"{path}/{FILE}")


def recorded(folder: str) -> Record:
    """The record in a trial's folder; an empty one where there is none."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    if not filesystem.exists(f"{path}/{FILE}"):
        return Record()
    told: dict[str, Any] = json.loads(filesystem.cat_file(f"{path}/{FILE}"))
    failure = Failure(**told["failure"]) if told["failure"] else None
    return Record(**told | {"history": tuple(told["history"]), "failure": failure})
