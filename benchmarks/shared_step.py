"""Milliseconds that workers on one host need to average gradients and step AdamW: by gloo's sockets, in shared memory.

    python -m benchmarks.shared_step [--mib 48] [--rounds 51]

Two processes of one thread each, every contender in turn, round after round. A backward pass that copies what it hands
out is in the time of both. Times are told only if both end with the same bits in all weights. Results go to
benchmarks/results and, as one JSON line, to stdout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.train_throughput import machine
from torch import Tensor, nn

from banjoray.training.shared_memory import SharedStep

WORKERS = 2
ROOT = Path(__file__).parents[1]
# Numbers of a parameter: 0.5 MiB, about those of MiniLM.
CELLS = 2**17


def main() -> int:
    """Start the workers, or be one; 1 if weights differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=48, help="of weights in fp32")
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return work(options)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.shared_step", *sys.argv[1:], "--store", f"{folder}/store"]
        workers = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
            for rank in range(WORKERS)
        ]
        first, *_ = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        return 1
    result = facts(options) | {"ms": json.loads(first)}
    path = ROOT / "benchmarks" / "results" / f"shared_step_{options.mib}mib.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, on what, with which versions."""
    described = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(described, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    return {
        "benchmark": "shared_step",
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
    parameters = options.mib * 2**18 // CELLS
    mine, found = drawn(parameters, options.rank), contenders(parameters)
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(options.rounds):
        for name, contender in found.items():
            torch.distributed.barrier()
            began = time.perf_counter()
            Brought.apply(mine, *contender.weights).backward()  # type: ignore[no-untyped-call]
            contender.step()
            times[name].append(1000 * (time.perf_counter() - began))
    one, *others = [contender.weights for contender in found.values()]
    if not all(torch.equal(left, right) for other in others for left, right in zip(one, other, strict=True)):
        print("the weights differ", file=sys.stderr)
        return 1
    if options.rank == 0:
        print(json.dumps({name: summary(taken) for name, taken in times.items()}))
    return 0


def contenders(parameters: int) -> "dict[str, Sockets | Shared]":
    """Every way to average the gradients of so many equal parameters and step them all."""
    return {"gloo": Sockets(parameters), "shared": Shared(parameters)}


class Brought(torch.autograd.Function):
    """A backward pass that has every gradient ready, in memory of its own."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *_: Tensor) -> Tensor:
        """A loss of these gradients."""
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        """Copies, one like every weight."""
        return (None, *(gradient.clone() for gradient in ctx.gradients))


class Sockets:
    """As DDP with one bucket: gradients are copied into it, averaged by gloo, and AdamW steps all weights."""

    def __init__(self, parameters: int) -> None:
        self.weights = weights(parameters)
        self._optimizer = torch.optim.AdamW(self.weights, fused=True)
        self._bucket = torch.empty(sum(weight.numel() for weight in self.weights))

    def step(self) -> None:
        """With the gradients that the backward pass has left."""
        views = [
            view.view_as(weight) for view, weight in zip(torch.split(self._bucket, CELLS), self.weights, strict=True)
        ]
        for view, weight in zip(views, self.weights, strict=True):
            assert weight.grad is not None
            view.copy_(weight.grad)
        torch.distributed.all_reduce(self._bucket)
        self._bucket.div_(WORKERS)
        for weight, view in zip(self.weights, views, strict=True):
            weight.grad = view
        self._optimizer.step()
        self._optimizer.zero_grad()


class Shared:
    """As banjoray's ddp on the CPUs of one host."""

    def __init__(self, parameters: int) -> None:
        self.weights = weights(parameters)
        self._optimizer = torch.optim.AdamW(self.weights, fused=True)
        shared = SharedStep.among_workers(self.weights)
        if shared is None:
            raise SystemExit(f"no shared memory for {WORKERS + 1} x {parameters * CELLS * 4 / 2**20:.0f} MiB")
        self._shared = shared

    def step(self) -> None:
        """With the gradients that the backward pass has left."""
        self._shared.average_()
        self._optimizer.step()
        self._shared.settle()
        self._optimizer.zero_grad()


def weights(parameters: int) -> list[nn.Parameter]:
    """The same on every worker."""
    return [nn.Parameter(numbers) for numbers in drawn(parameters, WORKERS)]


def drawn(parameters: int, seed: int) -> list[Tensor]:
    """Tensors of CELLS numbers each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(CELLS, generator=generator) for _ in range(parameters)]


def summary(taken: list[float]) -> dict[str, float]:
    """Median and range."""
    return {
        "median": round(statistics.median(taken), 1),
        "min": round(min(taken), 1),
        "max": round(max(taken), 1),
    }


if __name__ == "__main__":
    sys.exit(main())
