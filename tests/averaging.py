"""One of some ranks that average numbers: `averaging.py RANK RANKS STORE`; a line of JSON for every case.

Cases are lines of stdin: how many ``cells``, the ``most`` cells of a slot, ``memory`` (the folder of the shared file)
and perhaps one of these: the last rank is ``elsewhere``; files end at so many ``bytes``; the last rank ``dies`` when it
waits for the others that often, and theirs is what they are told.
"""

import json
import os
import resource
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from banjoray.training import shared_memory
from banjoray.training.shared_memory import SharedAverage

TIMEOUT = timedelta(seconds=60)


def numbers(rank: int, cells: int) -> Tensor:
    """What a rank brings along, (cells,)."""
    return torch.randn(cells, generator=torch.Generator().manual_seed(rank))


def main() -> None:
    """The cases, in the order of stdin."""
    rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.distributed.init_process_group(
        "gloo", init_method=store.as_uri(), rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    opened = shared_memory._opened
    for line in sys.stdin:
        case: dict[str, Any] = json.loads(line)
        shared_memory.MEMORY, shared_memory.MOST_CELLS = Path(case["memory"]), case["most"]
        elsewhere = case.get("elsewhere") and rank == ranks - 1
        shared_memory._opened = (lambda path, size: opened(f"{path}-elsewhere", size)) if elsewhere else opened
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.get("bytes", unlimited[0]), unlimited[1]))
        shared = SharedAverage.among_workers(case["cells"])
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        if "dies" in case and shared and rank == ranks - 1:
            die_waiting(shared, case["dies"])
        found: list[Any] = []
        if shared:
            # Twice: what is left in the slots from the first time is no part of the second.
            for _ in range(2):
                mine = numbers(rank, case["cells"])
                try:
                    shared.average_(mine)
                except RuntimeError as error:
                    found.append(str(error))
                    break
                found.append(mine.tolist())
        sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    # The group may be broken: nothing is left for it to do.
    os._exit(0)


def die_waiting(shared: SharedAverage, times: int) -> None:
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
