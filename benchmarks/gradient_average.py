"""Milliseconds that workers on one host need to average gradients: through gloo's sockets and through shared memory.

    python -m benchmarks.gradient_average [--mib 48] [--rounds 21]

Two processes of one thread each, in turn with every contender, round after round. Times are told only if all of them
give the same bits. Results go to benchmarks/results and, as one JSON line, to stdout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.train_throughput import machine

from banjoray.training import shared_memory
from banjoray.training.shared_memory import SharedAverage

WORKERS = 2
ROOT = Path(__file__).parents[1]
# MiB of a slot; the first is enough for all gradients.
SLOTS = (64, 16, 8, 4, 2, 1)
Contender = Callable[[torch.Tensor], object]


def main() -> int:
    """Start the workers, or be one; 1 if averages differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=48, help="of gradients in fp32")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return work(options)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gradient_average", *sys.argv[1:], "--store", f"{folder}/store"]
        workers = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
            for rank in range(WORKERS)
        ]
        first, *_ = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        return 1
    result = facts(options) | {"ms": json.loads(first)}
    path = ROOT / "benchmarks" / "results" / f"gradient_average_{options.mib}mib.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, on what, with which versions."""
    described = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(described, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    return {
        "benchmark": "gradient_average",
        "data": f"{options.mib} MiB of fp32, {WORKERS} processes of one thread",
        "rounds": options.rounds,
        "machine": machine(False),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {package: version(package) for package in ("banjoray", "torch")},
        "commit": commit,
    }


def work(options: argparse.Namespace) -> int:
    """One worker; rank 0 prints contender -> its milliseconds."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=options.store.as_uri(), rank=options.rank, world_size=WORKERS
    )
    mine = torch.randn(options.mib * 2**18, generator=torch.Generator().manual_seed(options.rank))
    found = contenders(len(mine))
    averages = [averaged(average, mine) for average in found.values()]
    if not all(torch.equal(average, averages[0]) for average in averages):
        print("the averages differ", file=sys.stderr)
        return 1
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(options.rounds):
        for name, average in found.items():
            numbers = mine.clone()
            torch.distributed.barrier()
            began = time.perf_counter()
            average(numbers)
            times[name].append(1000 * (time.perf_counter() - began))
    if options.rank == 0:
        print(json.dumps({name: summary(taken) for name, taken in times.items()}))
    return 0


def contenders(cells: int) -> dict[str, Contender]:
    """Every way to average so many numbers in place."""

    def gloo(numbers: torch.Tensor) -> None:
        torch.distributed.all_reduce(numbers)
        numbers.div_(WORKERS)

    found: dict[str, Contender] = {"gloo": gloo}
    for slot in SLOTS:
        shared_memory.MOST_CELLS = slot * 2**18
        shared = SharedAverage.among_workers(cells)
        if shared is None:
            raise SystemExit(f"no shared memory for {WORKERS} x {slot} MiB")
        found[f"shared_{slot}mib"] = shared.average_
    return found


def averaged(average: Contender, numbers: torch.Tensor) -> torch.Tensor:
    """What comes of a copy of them."""
    copied = numbers.clone()
    average(copied)
    return copied


def summary(taken: list[float]) -> dict[str, float]:
    """Median and range."""
    return {
        "median": round(statistics.median(taken), 1),
        "min": round(min(taken), 1),
        "max": round(max(taken), 1),
    }


if __name__ == "__main__":
    sys.exit(main())
