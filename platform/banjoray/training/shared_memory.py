"""The optimizer step of workers on one host, in memory that they share: no gradient goes through a socket, the weights
are there once for all workers, and each worker steps a part of them.
"""

import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

# Every tensor begins where one of torch's own would: at a multiple of 64 bytes.
ALIGNED = 16


class SharedStep:
    """The optimizer step of workers on one host.

    One memory holds the weights, and a slot of gradients for every worker. A worker puts its gradients into its slot
    while the backward pass makes them, and steps the parameters that are its own. Workers wait for each other by an
    exchange of one number through the process group, so a worker that died or hangs is found by the others as in any
    other exchange: by the group's error, after its timeout at the latest.
    """

    def __init__(self, memory: Tensor, rank: int, workers: int, parameters: Sequence[Tensor]) -> None:
        """``memory`` is shared, (cells,), fp32; from now on the parameters' weights are there, rank 0's."""
        sizes = [parameter.numel() for parameter in parameters]
        ends = list(accumulate(sizes))
        # A parameter is of the worker in whose part of all numbers its middle lies.
        owners = [(2 * end - size) * workers // (2 * ends[-1]) for size, end in zip(sizes, ends, strict=True)]
        self._owners = torch.tensor(owners)
        self._mine = [number for number, owner in enumerate(owners) if owner == rank]
        tensors, notes = torch.split(memory, [(1 + workers) * _width(parameters), 2 * workers * len(parameters)])
        weights, *self._slots = [_views(part, parameters) for part in tensors.view(1 + workers, -1)]
        # Of every worker and parameter: whether it has a gradient; the norm of the mean of all workers'.
        self._found, self._norms = notes.view(2, workers, -1)
        self._parameters, self._rank, self._token = parameters, rank, torch.zeros(1)
        self._filled: set[int] = set()
        for number, (parameter, shared) in enumerate(zip(parameters, weights, strict=True)):
            if rank == 0:
                shared.copy_(parameter.detach())
            parameter.data = shared
            hook = partial(_called, WeakMethod(self._keep), number)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self._wait()

    @classmethod
    def among_workers(cls, parameters: Sequence[Tensor]) -> "SharedStep | None":
        """For those parameters, all in fp32; None where not all workers can open one file, as on several hosts.

        Every worker calls it, and all get the same answer.
        """
        rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
        # Weights, a slot for each worker, and two numbers of each gradient.
        size = 4 * ((1 + workers) * _width(parameters) + 2 * workers * len(parameters))
        whole = all(parameter.dtype == torch.float32 for parameter in parameters)
        handle = _created(size) if rank == 0 and whole else None
        box: list[Any] = [(_host(), os.getpid(), handle)]
        torch.distributed.broadcast_object_list(box, src=0)
        host, process, theirs = box[0]
        memory = None if theirs is None else _opened(host, process, theirs, size)
        opened: list[bool] = [False] * workers
        torch.distributed.all_gather_object(opened, memory is not None)
        if handle is not None:
            os.close(handle)
        return cls(memory, rank, workers, parameters) if memory is not None and all(opened) else None

    def average_(self) -> Tensor:
        """Leave the mean of all workers' gradients in the parameters of this worker, and none in the others'.

        Returns the norm of all of them, the same on every worker.
        """
        mine = self._slots[self._rank]
        for number, gradient in enumerate(mine):
            self._found[self._rank, number] = number in self._filled
            if number not in self._filled:
                gradient.zero_()
        self._filled.clear()
        self._wait()
        used = self._found.any(dim=0).tolist()
        others = [slot for rank, slot in enumerate(self._slots) if rank != self._rank]
        for number in self._mine:
            mean = mine[number]
            for slot in others:
                mean.add_(slot[number])
            mean.div_(len(self._slots))
            self._norms[self._rank, number] = torch.linalg.vector_norm(mean)
            if used[number]:
                self._parameters[number].grad = mean
        self._wait()
        whole: Tensor = torch.linalg.vector_norm(self._norms[self._owners, torch.arange(len(self._owners))])
        return whole

    def settle(self) -> None:
        """Return when all workers have stepped their parameters."""
        self._wait()

    def gathered(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Copies of ``tensors``, one like every parameter, each from the worker that steps it; zeros for None.

        Goes through the slots of gradients, so it is for between two steps.
        """
        for number in self._mine:
            tensor = tensors[number]
            gradient = self._slots[self._rank][number]
            gradient.zero_() if tensor is None else gradient.copy_(tensor)
        self._wait()
        found = [self._slots[owner][number].clone() for number, owner in enumerate(self._owners.tolist())]
        # Nobody fills a slot while another still reads it.
        self._wait()
        return found

    def others(self) -> list[Tensor]:
        """The parameters that other workers step."""
        return [parameter for number, parameter in enumerate(self._parameters) if self._owners[number] != self._rank]

    def _keep(self, number: int, parameter: Tensor) -> None:
        """Put a gradient that was just made into the slot, and free its own memory for the next."""
        slot, gradient = self._slots[self._rank][number], parameter.grad
        assert gradient is not None
        slot.add_(gradient) if number in self._filled else slot.copy_(gradient)
        self._filled.add(number)
        parameter.grad = None

    def _wait(self) -> None:
        torch.distributed.all_reduce(self._token)


def _called(method: WeakMethod[Callable[[int, Tensor], None]], number: int, parameter: Tensor) -> None:
    """A parameter's hook, which does not hold what it calls: the memory goes with its `SharedStep`."""
    if keep := method():
        keep(number, parameter)


def _width(parameters: Sequence[Tensor]) -> int:
    """How many numbers one tensor like each parameter takes."""
    return sum(map(_cells, parameters))


def _cells(parameter: Tensor) -> int:
    return -(-parameter.numel() // ALIGNED) * ALIGNED


def _views(part: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """A row of memory as tensors like ``parameters``."""
    pieces = torch.split(part, [_cells(parameter) for parameter in parameters])
    return [piece[: like.numel()].view_as(like) for piece, like in zip(pieces, parameters, strict=True)]


def _host() -> tuple[str, int] | None:
    """What processes that can open each other's files have in common; None where there are no such files."""
    if not hasattr(os, "memfd_create"):
        # Only Linux has them.
        return None
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return boot, Path("/proc/self/ns/pid").stat().st_ino
    return None


def _created(size: int) -> int | None:
    """A file of memory without a name, of so many bytes; None where that can't be.

    Without a name it goes with the last process that has it open, and is not bound to the size of /dev/shm, of which
    containers often have 64 MB.
    """
    if _host() is None:
        return None
    handle = os.memfd_create("banjoray", os.MFD_CLOEXEC)
    try:
        # A file that is only told to be so long ends the process that writes to it when memory runs out.
        os.posix_fallocate(handle, 0, size)
    except OSError:
        os.close(handle)
        return None
    return handle


def _opened(host: tuple[str, int] | None, process: int, handle: int, size: int) -> Tensor | None:
    """A process's file of memory as fp32, (cells,); None where this process can't have it, as on another host."""
    if host is None or host != _host():
        return None
    try:
        mine = os.open(f"/proc/{process}/fd/{handle}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return torch.frombuffer(mmap.mmap(mine, size), dtype=torch.float32)
    except OSError:
        return None
    finally:
        os.close(mine)
