"""Data parallel and fully sharded workers: in shared memory, PyTorch's own DDP (through Accelerate), and FSDP2."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from banjoray.config.job import JobConfig
from banjoray.errors import ModelError, TrainingFailed
from banjoray.models.blocks import find_blocks
from banjoray.training.optimizer import (
    MOMENTS,
    adamw,
    fresh_state,
    plain_moments,
    restore_plain_moments,
    set_rate,
)
from banjoray.training.shared_memory import SharedStep
from banjoray.training.strategies import DTYPES, Forward, Precision

# Dynamic loss scaling of fp16, as torch.amp.GradScaler: where it starts, and after how many good steps it doubles.
FIRST_SCALE, STEPS_TO_DOUBLE = 65536.0, 2000


class DataParallel:
    """Every worker has the whole model, and gradients are averaged: by Accelerate, which is DDP.

    Workers on the CPUs of one host share memory instead, see `SharedStep`.
    """

    def __init__(self, job: JobConfig, model: nn.Module, precision: Precision, cuda: bool) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # Without cpu=True, Accelerate on a CPU machine ignores the process group, and workers train apart.
        options = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        self._accelerator = Accelerator(cpu=not cuda, kwargs_handlers=[options])
        self.rank = self._accelerator.process_index
        self.workers = self._accelerator.num_processes
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        if grouped and self.workers != (others := torch.distributed.get_world_size()):
            raise TrainingFailed(
                f"{others} workers are in one process group, but Accelerate sees {self.workers}, so they would train "
                f"apart; set RANK and WORLD_SIZE where the group is made"
            )
        self.device = self._accelerator.device
        self._dtype = DTYPES.get(precision)
        self._max_norm = job.train.max_grad_norm
        self.module = model.to(self.device)
        self._optimizer = adamw(job, model)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        shares = self.workers > 1 and not cuda
        self._together = SharedStep.among_workers(self._trained) if shares else None
        alone = self.workers == 1 or self._together is not None
        wrapped: nn.Module = model if alone else self._accelerator.prepare_model(model)
        compiled = job.train.torch_compile == "on"
        self._wrapped: nn.Module = torch.compile(wrapped, dynamic=True) if compiled else wrapped  # type: ignore[assignment]
        # fp16 gradients fall below its smallest number unless the loss is scaled up first.
        scale = FIRST_SCALE if precision == "fp16" else 1.0
        self._scale = torch.tensor(scale, device=self.device) if scale != 1 else None
        self._held = torch.zeros((), dtype=torch.int32, device=self.device)

    def gradients(self, forward: Forward, last: bool) -> Tensor:
        """See `Strategy`; gradients travel between workers with the last microbatch only."""
        quiet: AbstractContextManager[Any] = nullcontext() if last else self._accelerator.no_sync(self._wrapped)
        with quiet:
            with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not None):
                loss = forward(self._wrapped)
            # DDP averages what workers send; the batch's loss is the sum of their shares.
            (loss * self.workers * (1 if self._scale is None else self._scale)).backward()
        return loss.detach()

    def step(self, learning_rate: float) -> float:
        """See `Strategy`; clipping, unscaling and the test for numbers happen inside the fused kernel of AdamW."""
        set_rate(self._optimizer, learning_rate)
        scale = torch.ones((), device=self.device) if self._scale is None else self._scale
        norm = (self._together.average_() if self._together else self._norm()) / scale
        broken = (~torch.isfinite(norm)).float()
        # The names by which GradScaler hands a fused optimizer a divisor, and the wish to skip.
        optimizer: Any = self._optimizer
        optimizer.grad_scale = scale * ((norm + 1e-6) / self._max_norm).clamp(min=1)
        optimizer.found_inf = broken
        optimizer.step()
        if self._together:
            self._together.settle()
        optimizer.zero_grad(set_to_none=True)
        if self._scale is not None:
            torch._amp_update_scale_(self._scale, self._held, broken, 2.0, 0.5, STEPS_TO_DOUBLE)
        return float(norm)

    def weights(self, names: Collection[str], copy: bool = True) -> dict[str, Tensor]:
        """See `Strategy`."""
        if self.rank != 0:
            return {}
        state = self.module.state_dict()
        return {name: state[name].to("cpu", copy=copy) for name in names}

    def _norm(self) -> Tensor:
        """Of all gradients."""
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # noqa: SLF001
        return norm

    def moments(self) -> dict[str, Tensor]:
        """See `Strategy`."""
        together = self._gathered(self._together) if self._together else None
        if self.rank != 0:
            return {}
        scaling = {} if self._scale is None else {"loss_scale": torch.stack([self._scale, self._held.float()]).cpu()}
        return (plain_moments(self.module, self._optimizer) if together is None else together) | scaling

    def restore(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """See `Strategy`."""
        restore_plain_moments(self.module, self._optimizer, moments, steps)
        for parameter in self._together.others() if self._together else ():
            del self._optimizer.state[parameter]
        if self._scale is not None and "loss_scale" in moments:
            self._scale.copy_(moments["loss_scale"][0])
            self._held.copy_(moments["loss_scale"][1])

    def _gathered(self, together: SharedStep) -> dict[str, Tensor]:
        """The moments that workers hold in parts, whole on every worker."""
        state = self._optimizer.state
        held = [state.get(parameter, {}) for parameter in self._trained]
        names = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
        found: dict[str, Tensor] = {}
        for moment in MOMENTS:
            whole = together.gathered([moments.get(moment) for moments in held])
            found |= {f"{moment}.{name}": tensor for name, tensor in zip(names, whole, strict=True)}
        return found


class FullySharded:
    """Every worker holds its part of each weight, gradient and moment: FSDP2, block by block.

    From torch itself: Accelerate, told FSDP on CPUs, trains with plain DDP and says nothing.
    """

    def __init__(self, job: JobConfig, model: nn.Module, precision: Precision, cuda: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.workers = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self._dtype = DTYPES.get(precision)
        self._max_norm = job.train.max_grad_norm
        mesh = init_device_mesh(self.device.type, (self.workers,))
        self.module = model.to(self.device)
        for block in _stack(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self._optimizer = adamw(job, model)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients(self, forward: Forward, last: bool) -> Tensor:
        """See `Strategy`; gradients travel between workers with the last microbatch only."""
        sharded: Any = self.module
        sharded.set_requires_gradient_sync(last)
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not None):
            loss = forward(self.module)
        (loss * self.workers).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, learning_rate: float) -> float:
        """See `Strategy`."""
        set_rate(self._optimizer, learning_rate)
        sharded: Any = nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        norm = sharded.full_tensor() if hasattr(sharded, "full_tensor") else sharded
        if torch.isfinite(norm):
            nn.utils.clip_grads_with_norm_(self._trained, self._max_norm, norm)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def weights(self, names: Collection[str], copy: bool = True) -> dict[str, Tensor]:
        """See `Strategy`; gathered one at a time, so always copies."""
        state = self.module.state_dict()
        return self._gathered({name: state[name] for name in names})

    def moments(self) -> dict[str, Tensor]:
        """See `Strategy`."""
        return self._gathered(
            {
                f"{moment}.{name}": self._optimizer.state[parameter][moment]
                for name, parameter in self.module.named_parameters()
                if parameter in self._optimizer.state
                for moment in MOMENTS
            }
        )

    def restore(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """See `Strategy`."""
        from torch.distributed.tensor import distribute_tensor

        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                cut: Any = parameter
                state = fresh_state(parameter, steps)
                for moment in MOMENTS:
                    whole = moments[f"{moment}.{name}"].to(self.device)
                    state[moment] = distribute_tensor(whole, cut.device_mesh, cut.placements)
                self._optimizer.state[parameter] = state

    def _gathered(self, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.rank == 0:
                whole[name] = full.detach().to("cpu", copy=True)
        return whole


def _stack(model: Any) -> list[nn.Module]:
    """The blocks to shard one by one; none where the model has no stack, or runs one block at several depths."""
    try:
        found = find_blocks(model)
    except ModelError:
        return []
    stack = model.base_model.get_submodule(found.stack)
    return [] if found.shared else list(stack)
