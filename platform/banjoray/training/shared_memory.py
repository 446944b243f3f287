"""Gradients of workers on one host: averaged in memory that they share, instead of through sockets.

A socket copies them into the kernel and out of it again; benchmarks/gradient_average.py times both ways.
"""

import mmap
import os
import secrets
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.futures import Future

# A file system of memory; containers often have 64 MB of it.
MEMORY = Path("/dev/shm")
# The most that a worker has in it, fp32; more gradients than that are averaged part by part. Where there is no room
# for so much, an eighth of it.
MOST_CELLS = 64 * 2**20 // 4
SHARES = (1, 8)


class SharedAverage:
    """A slot for every worker in one file, which has no name any more once all have it open.

    Workers wait for each other by an exchange of one number through the process group, so a worker that died or hangs
    is found by the others as in any other exchange: by the group's error, after its timeout at the latest.
    """

    def __init__(self, slots: Tensor, rank: int) -> None:
        """``slots`` is shared, (workers, cells), fp32."""
        self._slots, self._rank = slots, rank
        self._token = torch.zeros(1)

    @classmethod
    def among_workers(cls, cells: int) -> "SharedAverage | None":
        """For so many numbers; None where not all workers are on one host, or its shared memory is too small.

        Every worker calls it, and all get the same answer.
        """
        rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
        made = [_created(workers, min(cells, MOST_CELLS)) if rank == 0 else None]
        torch.distributed.broadcast_object_list(made, src=0)
        slots = _opened(*made[0]) if made[0] else None
        found: list[bool] = [False] * workers
        torch.distributed.all_gather_object(found, slots is not None)
        if rank == 0 and made[0]:
            Path(made[0][0]).unlink()
        return cls(slots.view(workers, -1), rank) if slots is not None and all(found) else None

    def average_(self, numbers: Tensor) -> None:
        """Put the mean of all workers' ``numbers`` in their place; (cells,) fp32, as many on every worker.

        Every worker adds up one part of them for all, so that all end with the same bits.
        """
        for piece in torch.split(numbers, self._slots.shape[1]):
            slots = self._slots[:, : len(piece)]
            slots[self._rank].copy_(piece)
            self._wait()
            workers = len(slots)
            sums, parts = piece.tensor_split(workers), slots.tensor_split(workers, dim=1)
            torch.mean(parts[self._rank], dim=0, out=sums[self._rank])
            parts[self._rank][self._rank].copy_(sums[self._rank])
            self._wait()
            for other in range(workers):
                if other != self._rank:
                    sums[other].copy_(parts[other][other])
            # Nobody fills a slot while another still reads it.
            self._wait()

    def _wait(self) -> None:
        torch.distributed.all_reduce(self._token)


def averaged(shared: SharedAverage, bucket: torch.distributed.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    """A communication hook of DDP."""
    shared.average_(bucket.buffer())
    done: Future[Tensor] = Future()
    done.set_result(bucket.buffer())
    return done


def _created(workers: int, cells: int) -> tuple[str, int] | None:
    """The path and bytes of a new file with a slot of at most ``cells`` for each worker; None where that can't be."""
    path = MEMORY / f"banjoray-{secrets.token_hex(16)}"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None
    try:
        for share in SHARES:
            size = workers * -(-cells // share) * 4
            # A file that is only told to be so long ends the process that writes to it when memory runs out.
            with suppress(OSError):
                os.posix_fallocate(handle, 0, size)
                return str(path), size
    finally:
        os.close(handle)
    path.unlink()
    return None


def _opened(path: str, size: int) -> Tensor | None:
    """A file of shared memory as fp32, (cells,); None where this process can't have it, as on another host."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return torch.frombuffer(mmap.mmap(handle, size), dtype=torch.float32)
    except OSError:
        return None
    finally:
        os.close(handle)
