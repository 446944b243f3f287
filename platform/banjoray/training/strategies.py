"""How workers share one optimizer step: what every strategy promises, and which one a job gets.

All keep fp32 weights and run the forward pass under autocast, so that they differ in what they shard and in nothing
else: the same numbers come out, and a checkpoint of one resumes under another.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from banjoray.config.job import JobConfig

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# On an H200, a BERT of three blocks was still being compiled after a minute.
COMPILED_FROM = 20_000
Forward = Callable[[nn.Module], Tensor]
"""The module that takes part in the exchange -> what this worker's rows add to the batch's loss."""


@dataclass(frozen=True)
class Choice:
    """A precision and the reason for it."""

    precision: Precision
    reason: str


def choose_precision(job: JobConfig) -> Choice:
    """What ``train.precision`` comes to on this hardware."""
    if job.train.precision != "auto":
        return Choice(job.train.precision, "asked for")
    native = native_bf16("cuda" if job.scale.gpus_per_worker else "cpu")
    if job.scale.gpus_per_worker:
        if native:
            return Choice("bf16", "this GPU multiplies bf16 natively")
        if job.scale.strategy != "ddp":
            return Choice("fp32", "this GPU has no native bf16, and fp16 goes with ddp alone")
        return Choice("fp16", "this GPU has no native bf16")
    if native:
        return Choice("bf16", f"this CPU multiplies bf16 natively ({native})")
    return Choice("fp32", "this CPU has no native bf16, and emulated bf16 is slower than fp32")


def coarse(job: JobConfig) -> bool:
    """Whether training batches have widths that recur.

    In bf16 on a CPU oneDNN writes code for every shape that it meets, milliseconds for each product, and keeps a
    thousand of them: where every length is a width of its own, that is a seventh of a short run (benchmarks/LOG.md).
    Batches that are bounded in tokens stay as they are, and those of pairs that are taken apart to be embedded.
    """
    half = not job.scale.gpus_per_worker and choose_precision(job).precision == "bf16"
    return half and job.train.batching.mode == "rows" and job.task != "feature-extraction"


def compiles(job: JobConfig, steps: int) -> bool:
    """Whether torch.compile is worth its minutes in a run of so many steps, or wanted anyway."""
    worth = bool(job.scale.gpus_per_worker) and job.scale.strategy == "ddp" and steps >= COMPILED_FROM
    return job.train.torch_compile == "on" or (job.train.torch_compile == "auto" and worth)


def native_bf16(device: str) -> str:
    """What multiplies bf16 natively on a device, cuda or cpu; empty where nothing does."""
    if device == "cuda":
        return "cuda" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    flags = torch.cpu.get_capabilities()
    return next((flag for flag in ("amx_bf16", "avx512_bf16") if flags.get(flag)), "")


class Strategy(Protocol):
    """One worker's part in the steps of all workers. Every method is called by all workers, in the same order."""

    rank: int
    workers: int
    device: torch.device
    module: nn.Module
    """The model for evaluation, in fp32."""

    def gradients(self, forward: Forward, last: bool) -> Tensor:
        """Add the gradients of ``forward``'s loss to those of the step; all workers' are summed up.

        ``last`` marks the last microbatch of a step. Returns this worker's loss, detached.
        """
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, change the weights, clear the gradients; the gradient norm before clipping.

        Where that is not finite, weights and moments stay as they were (but not under zero0).
        """
        ...

    def weights(self, names: Collection[str], copy: bool = True) -> dict[str, Tensor]:
        """Those weights and buffers, whole, on the CPU, by their names; empty but on rank 0.

        Without ``copy`` they may be the model's own, which the next step changes.
        """
        ...

    def moments(self) -> dict[str, Tensor]:
        """AdamW's moments, whole, by ``exp_avg.<name>`` and ``exp_avg_sq.<name>``; empty but on rank 0.

        Under fp16 also ``loss_scale``: the scale, and how many steps it has held.
        """
        ...

    def restore(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Put moments back, as after ``steps`` optimizer steps; on any number of workers."""
        ...


def build(job: JobConfig, model: nn.Module, precision: Precision) -> Strategy:
    """The job's strategy around a model, in a process that may be one of several workers."""
    from banjoray.training.parallel import DataParallel, FullySharded

    cuda = job.scale.gpus_per_worker > 0
    if cuda:
        # Under autocast too: what it leaves in fp32 is little, but slow.
        torch.backends.cuda.matmul.fp32_precision = "ieee" if precision == "fp32" else "tf32"
    if job.scale.strategy == "ddp":
        return DataParallel(job, model, precision, cuda)
    if job.scale.strategy == "fsdp":
        return FullySharded(job, model, precision, cuda)
    from banjoray.training.zero import Zero

    return Zero(job, model, precision, cuda)
