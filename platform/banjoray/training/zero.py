"""DeepSpeed ZeRO under the same promises as every other strategy."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, nn

from banjoray.config.job import JobConfig
from banjoray.training.optimizer import (
    MOMENTS,
    adamw,
    fresh_state,
    plain_moments,
    restore_plain_moments,
    set_rate,
)
from banjoray.training.strategies import Forward, Precision

# Bytes; where a buffer for reading past the page cache may begin, on any disk.
PAGE = 4096


class Zero:
    """DeepSpeed ZeRO: stage 1 shards the optimizer state, 2 also the gradients, 3 also the parameters."""

    def __init__(self, job: JobConfig, model: nn.Module, precision: Precision, cuda: bool) -> None:
        import deepspeed

        self.stage = int(job.scale.strategy.removeprefix("zero"))
        self._microbatches = job.train.gradient_accumulation_steps
        self.workers = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        # From deepspeed.initialize itself: Trainer(deepspeed=...) and Accelerate fall back to plain DDP on CPU.
        self.engine, *_ = deepspeed.initialize(
            model=model.to(self.device),
            optimizer=adamw(job, model),
            config=self._config(job, precision),
            dist_init_required=False,
        )
        self.module = self.engine.module
        if job.scale.offload == "nvme":
            _keep_unaligned_gradients(self.engine.optimizer.optimizer_swapper)
        _limit_waiting(job.scale.collective_timeout_s)

    def _config(self, job: JobConfig, precision: Precision) -> dict[str, Any]:
        rows = -(-job.train.batch_size // (self.workers * self._microbatches))
        zero: dict[str, Any] = {"stage": self.stage}
        if job.scale.offload == "cpu":
            zero["offload_optimizer"] = {"device": "cpu"}
        if job.scale.offload == "nvme":
            zero["offload_optimizer"] = {"device": "nvme", "nvme_path": job.scale.nvme_path}
        return {
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": self._microbatches,
            "gradient_clipping": job.train.max_grad_norm,
            "zero_optimization": zero,
            # torch's AdamW, the same arithmetic as under ddp; also where the optimizer state is offloaded.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {
                "enabled": precision == "bf16",
                "dtype": "bfloat16",
                # Else ZeRO-3 gathers the weights of linear layers in that dtype, for evaluation too.
                "lower_precision_safe_modules": [],
            },
            "steps_per_print": 2**31,
        }

    def gradients(self, forward: Forward, last: bool) -> Tensor:
        """See `Strategy`; the engine counts microbatches itself, and divides by their number."""
        loss = forward(self.engine)
        self.engine.backward(loss * (self.workers * self._microbatches))
        if not last:
            self.engine.step()
        return loss.detach()

    def step(self, learning_rate: float) -> float:
        """See `Strategy`."""
        set_rate(self.engine.optimizer, learning_rate)
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def weights(self, names: Collection[str], copy: bool = True) -> dict[str, Tensor]:
        """See `Strategy`; gathered one at a time, frozen ones too."""
        import deepspeed

        parameters = dict(self.module.named_parameters())
        state = {name: tensor for name, tensor in self.module.state_dict().items() if name not in parameters}
        whole: dict[str, Tensor] = {}
        for name in names:
            held = [parameters[name]] if name in parameters else []
            with deepspeed.zero.GatheredParameters(held, enabled=self.stage == 3 and bool(held)):
                if self.rank == 0:
                    whole[name] = (held[0] if held else state[name]).detach().to("cpu", copy=copy or self.stage == 3)
        return whole

    def moments(self) -> dict[str, Tensor]:
        """See `Strategy`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return plain_moments(self.module, self.engine.optimizer) if self.rank == 0 else {}
        self._link()
        gathered: dict[str, Tensor] = {}
        for name, parameter in self._trained():
            for moment in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, moment)
                if self.rank == 0:
                    gathered[f"{moment}.{name}"] = whole.to("cpu", copy=True).reshape(parameter_shape(parameter))
        return gathered

    def restore(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """See `Strategy`."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if self.stage == 0:
            restore_plain_moments(self.module, self.engine.optimizer, moments, steps)
            return
        sharded, adam = self.engine.optimizer, self.engine.optimizer.optimizer
        flat = sharded.fp32_partitioned_groups_flat if self.stage == 3 else sharded.single_partition_of_fp32_groups
        for number, shard in enumerate(flat):
            with self._in_memory(number):
                adam.state[shard] = fresh_state(shard, steps)
        self._link()
        for name, parameter in self._trained():
            for moment in MOMENTS:
                value = moments[f"{moment}.{name}"].to(self.device)
                safe_set_full_optimizer_state(parameter, value, moment)

    @contextmanager
    def _in_memory(self, number: int) -> Iterator[None]:
        """A shard that lies on a disk (offload nvme) is in memory while the block runs; out there it has no size."""
        sharded = self.engine.optimizer
        swapped = self.stage == 3 and sharded._swappable_optimizer_subgroup(number)  # noqa: SLF001
        if swapped:
            sharded._optimizer_states_and_gradient_swap_in(number)  # noqa: SLF001
        yield
        if swapped:
            sharded._optimizer_states_and_gradient_swap_out(number)  # noqa: SLF001

    def _link(self) -> None:
        """Tell parameters where their optimizer state is.

        Stages 1 and 2 do this once, after the first step of the first parameter group, when the second group has no
        state yet (DeepSpeed 0.19.8); delete when that is after all groups.
        """
        if self.stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False  # noqa: SLF001
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()  # noqa: SLF001

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)


def _keep_unaligned_gradients(swapper: Any) -> None:
    """Let gradients stay in memory that don't begin at a page of the buffer into which they would be read again.

    DeepSpeed 0.19.8 reads with O_DIRECT, which takes no other address, and doesn't look whether it could: the step is
    made with what the buffer held before. Delete when it aligns them.
    """
    swap_out = swapper.swap_out_gradients

    def swap_out_aligned(parameter: Any, gradient_offsets: list[int], gradient_tensors: list[Tensor]) -> None:
        for offset, gradient in zip(gradient_offsets, gradient_tensors, strict=True):
            cast(Any, gradient).swappable = offset * gradient.element_size() % PAGE == 0
        swap_out(parameter, gradient_offsets, gradient_tensors)

    swapper.swap_out_gradients = swap_out_aligned


def _limit_waiting(timeout_s: int) -> None:
    """Let no exchange wait longer.

    DeepSpeed makes process groups of its own, which wait half an hour, whatever the first one was told (0.19.8);
    delete when they take its timeout.
    """
    from torch.distributed import distributed_c10d

    for group in distributed_c10d._world.pg_map:  # noqa: SLF001
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)  # noqa: SLF001


def parameter_shape(parameter: nn.Parameter) -> torch.Size:
    """The whole shape of a parameter that ZeRO-3 may have cut into pieces."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
