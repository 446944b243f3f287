"""One of some ranks that average numbers: `averaging.py RANK RANKS STORE MEMORY`; a line of JSON for every case.

Cases are lines of stdin: how many ``cells``, the ``most`` cells of a slot, ``memory`` (the folder of the shared file
as rank 0 sees it) and, perhaps, that the last rank is ``elsewhere`` or files end at so many ``bytes``.
"""

import json
import resource
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
        found: list[list[float]] = []
        if shared:
            # Twice: what is left in the slots from the first time is no part of the second.
            for _ in range(2):
                mine = numbers(rank, case["cells"])
                shared.average_(mine)
                found.append(mine.tolist())
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
