"""Workers without Ray: a few processes with a gloo process group do a plan of cases, results come back as files."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("worker.py")
Told = dict[str, Any]


@pytest.fixture(scope="session")
def launch() -> Callable[[Path, int, list[Mapping[str, Any]]], dict[str, list[Told]]]:
    """Runs cases on some workers; case name -> what each rank told, in the order of ranks.

    A case has ``name``, ``job``, ``run`` (the folder of its checkpoints) and perhaps ``interrupt_at``, the step at
    which every rank dies instead of making it. A rank tells what `worker.py` writes, with its ``weights``.
    """

    def run(folder: Path, workers: int, cases: list[Mapping[str, Any]]) -> dict[str, list[Told]]:
        folder.mkdir(parents=True)
        plan = [{**case, "job": case["job"].to_json(), "run": str(case["run"])} for case in cases]
        (folder / "plan.json").write_text(json.dumps(plan))
        _run_all(folder, workers)
        return {case["name"]: [_read(folder, case["name"], rank) for rank in range(workers)] for case in cases}

    return run


def _read(folder: Path, case: str, rank: int) -> Told:
    from safetensors.torch import load_file

    told: Told = json.loads((folder / f"{case}.rank{rank}.json").read_text())
    return told | {"weights": load_file(folder / f"{case}.rank{rank}.safetensors")}


def _run_all(folder: Path, workers: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder / f"worker{rank}.log" for rank in range(workers)]
    processes = [_start(rank, workers, port, log) for rank, log in enumerate(logs)]
    try:
        # A worker that failed ends them all: the others would wait for it in the next exchange.
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for code, log in zip(codes, logs, strict=True):
        assert not code, f"{log.name} ended with {code}:\n{log.read_text()[-4000:]}"


def _start(rank: int, workers: int, port: int, log: Path) -> "subprocess.Popen[bytes]":
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings = {
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    environment = os.environ | settings | {name: str(value) for name, value in place.items()}
    with log.open("wb") as file:
        command = [sys.executable, str(WORKER), str(log.with_name("plan.json"))]
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)
