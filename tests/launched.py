"""Workers without Ray: runs of a few processes with a gloo process group, and what they told."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

WORKER = Path(__file__).with_name("ray") / "worker.py"
SETTINGS = {"DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

Case = Mapping[str, Any]
"""A run: ``name``, ``job``, ``run`` (the folder of its checkpoints) and perhaps ``attempts``.

Each attempt has a number of ``workers``, and perhaps what its ``rank`` ``does`` when it has begun step ``at_step``
(kill: dies; hang: stops until the others have given up; term: gets a SIGTERM), and the file to ``tear`` of the newest
checkpoint before the next attempt. Without them it is one attempt, with the job's workers.
"""


@dataclass(frozen=True)
class Told:
    """What one rank told at the end of an attempt: its files begin with ``stem``; ``facts`` is empty if it died."""

    stem: Path
    facts: dict[str, Any]

    @property
    def seen(self) -> dict[str, Any]:
        """What the rank knew of its strategy, see `worker.Seen`."""
        seen: dict[str, Any] = self.facts["seen"]
        return seen

    @property
    def weights(self) -> dict[str, Tensor]:
        """Every weight, whole, as this rank sees it."""
        return load_file(f"{self.stem}.safetensors")

    @property
    def start(self) -> dict[str, Tensor]:
        """Rank 0's weights from before the attempt's first step."""
        return load_file(f"{self.stem}.start.safetensors")


@dataclass(frozen=True)
class Attempt:
    """One attempt at a case: the steps that it made, what it noted about its start, and its ranks."""

    steps: list[int]
    note: str
    ranks: list[Told]


Launch = Callable[[Path, list[Case]], dict[str, list[Attempt]]]


@contextmanager
def workers() -> Iterator[Launch]:
    """Runs cases, whose logs go into a new folder, while the block runs; case name -> its attempts."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore::FutureWarning", str(WORKER)],
        env=os.environ | SETTINGS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:

        def launch(folder: Path, cases: list[Case]) -> dict[str, list[Attempt]]:
            folder.mkdir(parents=True)
            plan = [_planned(case) for case in cases]
            (folder / "plan.json").write_text(json.dumps(plan))
            assert process.stdin
            assert process.stdout
            print(folder / "plan.json", file=process.stdin, flush=True)
            failure = json.loads(process.stdout.readline())
            assert not failure, failure
            return {case["name"]: _attempts(folder, case) for case in plan}

        try:
            yield launch
        finally:
            # With the ranks of a plan that was given up.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _planned(case: Case) -> dict[str, Any]:
    job = case["job"]
    usual = {"attempts": [{"workers": job.scale.most_workers}]}
    return {**usual, **case, "job": job.to_json(), "run": str(case["run"])}


def _attempts(folder: Path, case: dict[str, Any]) -> list[Attempt]:
    return [
        _attempt([folder / f"{case['name']}-{number}-rank{rank}" for rank in range(attempt["workers"])])
        for number, attempt in enumerate(case["attempts"])
    ]


def _attempt(stems: list[Path]) -> Attempt:
    moments = [json.loads(line) for line in stems[0].with_suffix(".jsonl").read_text().splitlines()]
    ranks = [Told(stem, _facts(stem.with_suffix(".json"))) for stem in stems]
    return Attempt([moment["step"] for moment in moments], moments[-1]["note"] if moments else "", ranks)


def _facts(file: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return facts
