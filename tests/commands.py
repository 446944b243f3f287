"""The command line as a user runs it, in a process that tests may kill."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml

from banjoray.config.job import JobConfig

BANJORAY = str(Path(sys.executable).parent / "banjoray")
DRIVER = "banjoray"


class Command:
    """`banjoray train` or `tune`, to be started again when it has ended; what it starts is remembered."""

    def __init__(self, folder: Path, job: JobConfig, verb: str) -> None:
        self._folder, self._verb, self._family = folder, verb, set[Any]()
        (folder / "job.yaml").write_text(yaml.safe_dump(job.to_json()), encoding="utf-8")
        self.start()

    def start(self) -> None:
        """Start it; what it prints goes to ``out`` and ``err``."""
        self.out, self.err = (self._folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            # Its own Ray, not the one of this test session.
            environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
            command = [BANJORAY, self._verb, "job.yaml", "--json"]
            self.process = subprocess.Popen(command, cwd=self._folder, env=environment, stdout=out, stderr=err)

    def found(self, kind: str) -> list[Any]:
        """Its running processes of a kind, oldest first."""
        if kind == DRIVER:
            return [psutil.Process(self.process.pid)]
        family = psutil.Process(self.process.pid).children(recursive=True)
        self._family.update(family)
        return [member for member in family if name_of(member).startswith(kind)]

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        written = self._folder.glob("runs/*/checkpoints/step-*/checkpoint.json")
        return max((int(file.parent.name.removeprefix("step-")) for file in written), default=0)

    def until(self, wanted: Callable[[], bool]) -> None:
        """Wait while it runs."""
        while not wanted():
            assert self.process.poll() is None, self.err.read_text()[-3000:]
            time.sleep(0.02)

    def end(self) -> None:
        """Kill what is left of it, and what it left."""
        self.process.kill()
        self.process.wait()
        for member in self._family:
            with suppress(psutil.NoSuchProcess):
                member.kill()


def name_of(process: Any) -> str:
    """A process's name; empty if it is gone."""
    try:
        name: str = process.name()
    except psutil.NoSuchProcess:
        return ""
    return name
