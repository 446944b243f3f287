"""What workers tell each other at every step, and who is to blame when one falls silent."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from banjoray.errors import TrainingFailed


@dataclass(frozen=True)
class Beat:
    """A step as all workers know it: the whole batch's loss, and whether any of them was told to end."""

    loss: float
    stop: bool


class Pulse:
    """One small exchange per step; before it every worker leaves word of how far it is."""

    def __init__(self, rank: int, workers: int, device: torch.device, timeout_s: int) -> None:
        self._rank, self._workers, self._device, self._timeout_s = rank, workers, device, timeout_s
        self._at = (0, 0)

    def mark(self, step: int, phase: int) -> None:
        """This worker is in ``step``: 0 has begun it, 1 is about to hand out its gradients."""
        self._at = (step, phase)
        if self._workers > 1:
            _store().set(f"banjoray/{self._rank}", f"{step} {phase} {time.time()}")

    def exchange(self, loss: Tensor, stop: bool) -> Beat:
        """The sum of all workers' ``loss``, and whether one has ``stop``."""
        if self._workers == 1:
            return Beat(float(loss), stop)
        told = torch.stack([loss.double(), torch.tensor(float(stop), dtype=torch.float64, device=self._device)])
        torch.distributed.all_reduce(told)
        return Beat(float(told[0]), bool(told[1] > 0))

    def blame(self, error: Exception) -> TrainingFailed | None:
        """An exchange that failed, as an error that names the worker that was missing; None for any other error."""
        # gloo raises plain RuntimeErrors, with the place in its source at the start.
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if self._workers == 1 or not lost:
            return None
        reason = str(error).splitlines()[0].rsplit("] ", 1)[-1]
        try:
            marks = {rank: self._last(rank) for rank in range(self._workers) if rank != self._rank}
        except (RuntimeError, ValueError):
            # The store lives in worker 0.
            return TrainingFailed(f"worker 0 is gone (step {self._at[0] + 1}, {reason})")
        late = {rank: mark for rank, mark in marks.items() if mark[:2] < self._at} or marks
        rank, (step, _, seen) = min(late.items(), key=lambda item: item[1])
        return TrainingFailed(
            f"worker {rank} did not take part in an exchange: last seen at step {step + 1}, "
            f"{time.time() - seen:.0f} s ago ({reason}; scale.collective_timeout_s is {self._timeout_s})"
        )

    @staticmethod
    def _last(rank: int) -> tuple[int, int, float]:
        key = f"banjoray/{rank}"
        if not _store().check([key]):
            return (-1, 0, time.time())
        step, phase, seen = _store().get(key).decode().split()
        return (int(step), int(phase), float(seen))


def _store() -> Any:
    """The key-value store by which the process group was made: reachable while its exchanges are not."""
    return torch.distributed.distributed_c10d._get_default_store()  # noqa: SLF001
