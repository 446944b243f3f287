"""One of some ranks that step weights together: `stepping.py RANK RANKS STORE`; a line of JSON for every case.

Cases are lines of stdin: the ``sizes`` of the parameters and perhaps some of these: ``unused`` parameters have no
gradient anywhere, those of ``rare`` on rank 0 alone; a step has so many ``microbatches``; parameters are ``double``;
the last rank is on another ``host``, or can't ``open`` the file; rank 0 has so much memory in ``bytes``; the
last rank ``dies`` when it waits for the others that often, and theirs is what they are told.
"""

import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from banjoray.training import shared_memory
from banjoray.training.shared_memory import SharedStep

TIMEOUT = timedelta(seconds=60)
STEPS, RATE = 2, 0.1


def weights(case: dict[str, Any], rank: int = 0) -> list[Tensor]:
    """What a rank begins with; the others' are not asked for."""
    return numbers(case, 1000 + rank)


def gradients(case: dict[str, Any], rank: int) -> list[Tensor | None]:
    """What a rank brings along to every step."""
    unused = {*case.get("unused", []), *(case.get("rare", []) if rank else [])}
    return [None if number in unused else cells for number, cells in enumerate(numbers(case, rank))]


def numbers(case: dict[str, Any], seed: int) -> list[Tensor]:
    """One tensor for every size."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if case.get("double") else torch.float32
    return [torch.randn(size, generator=generator, dtype=dtype) for size in case["sizes"]]


def main() -> None:
    """The cases, in the order of stdin."""
    rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.distributed.init_process_group(
        "gloo", init_method=store.as_uri(), rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    host, opened = shared_memory._host, shared_memory._opened
    for line in sys.stdin:
        case: dict[str, Any] = json.loads(line)
        last = rank == ranks - 1
        shared_memory._host = (lambda: ("another", 1)) if last and case.get("host") else host
        shared_memory._opened = partial(nobodys, opened) if last and case.get("open") else opened
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.get("bytes", unlimited[0]), unlimited[1]))
        parameters = [nn.Parameter(weight) for weight in weights(case, rank)]
        shared = SharedStep.among_workers(parameters)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        if "dies" in case and shared and last:
            die_waiting(shared, case["dies"])
        try:
            found = stepped(shared, parameters, gradients(case, rank), case.get("microbatches", 1)) if shared else []
        except RuntimeError as error:
            found = [str(error)]
        del shared, parameters
        gc.collect()
        sys.stdout.write(json.dumps({"steps": found, "left": left()}) + "\n")
    sys.stdout.flush()
    # The group may be broken: nothing is left for it to do.
    os._exit(0)


def nobodys(
    opened: Callable[..., Tensor | None], host: tuple[str, int], _: int, handle: int, size: int
) -> Tensor | None:
    """As if the file were one of a process that has ended."""
    return opened(host, 2**22 + 1, handle, size)


def stepped(
    shared: SharedStep, parameters: list[nn.Parameter], brought: list[Tensor | None], microbatches: int
) -> list[Any]:
    """After every step: the norm, the numbers of the parameters that were stepped here, all weights; gathered ranks."""
    found = []
    for _ in range(STEPS):
        for _ in range(microbatches):
            pairs = zip(parameters, brought, strict=True)
            losses = [(weight * gradient).sum() for weight, gradient in pairs if gradient is not None]
            if losses:
                (torch.stack(losses).sum() / microbatches).backward()  # type: ignore[no-untyped-call]
        norm = shared.average_()
        here = [number for number, parameter in enumerate(parameters) if parameter.grad is not None]
        with torch.no_grad():
            for number in here:
                parameters[number].sub_(parameters[number].grad, alpha=RATE)  # type: ignore[arg-type]
                parameters[number].grad = None
        shared.settle()
        ranks = [torch.full_like(parameter, torch.distributed.get_rank()) for parameter in parameters]
        whose = shared.gathered([ranks[number] if number in here else None for number in range(len(ranks))])
        found.append([float(norm), here, [weight.tolist() for weight in parameters], [one.tolist() for one in whose]])
    return found


def left() -> int:
    """How many files of shared memory this process has open."""
    handles = Path("/proc/self/fd")
    return sum("banjoray" in str(handle.readlink()) for handle in handles.iterdir() if handle.is_symlink())


def die_waiting(shared: SharedStep, times: int) -> None:
    """Have this process killed when it is about to wait for the others, the n-th time."""
    wait, left = shared._wait, iter(range(1, times))

    def waiting() -> None:
        if next(left, None) is None:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        wait()

    shared._wait = waiting  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
