"""How workers share one optimizer step: data parallel by Accelerate, ZeRO by DeepSpeed.

Both keep fp32 weights and run the forward pass under autocast, so that they differ in what they shard and in
nothing else: the same numbers come out, and a checkpoint of one resumes under the other.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from banjoray.config.job import JobConfig

Precision = Literal["fp32", "bf16", "fp16"]
MOMENTS = ("exp_avg", "exp_avg_sq")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Choice:
    """A precision and the reason for it."""

    precision: Precision
    reason: str


def choose_precision(wanted: str, cuda: bool) -> Choice:
    """What ``train.precision`` comes to on this hardware."""
    if wanted in ("fp32", "bf16", "fp16"):
        return Choice(wanted, "asked for")  # type: ignore[arg-type]
    if cuda:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16", "this GPU multiplies bf16 natively")
        return Choice("fp16", "this GPU has no native bf16")
    flags = torch.cpu.get_capabilities()
    native = [flag for flag in ("amx_bf16", "avx512_bf16") if flags.get(flag)]
    if native:
        return Choice("bf16", f"this CPU multiplies bf16 natively ({native[0]})")
    return Choice("fp32", "this CPU has no native bf16, and emulated bf16 is slower than fp32")


class Strategy(Protocol):
    """One worker's part in the steps of all workers. Every method is called by all workers, in the same order."""

    rank: int
    workers: int
    device: torch.device
    module: nn.Module
    """The model for evaluation, in fp32."""

    def gradients(self, inputs: Mapping[str, Tensor], weight: float, last: bool) -> float:
        """Add ``weight`` x (mean loss of ``inputs``) x workers to the gradients, which are averaged over workers.

        ``last`` marks the last microbatch of a step. Returns weight x loss.
        """
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, change the weights, clear the gradients; the gradient norm before clipping."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Every weight, whole, fp32, on the CPU, by its name in the model; empty but on rank 0."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """AdamW's moments, whole, by ``exp_avg.<name>`` and ``exp_avg_sq.<name>``; empty but on rank 0."""
        ...

    def restore(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Put moments back, as after ``steps`` optimizer steps; on any number of workers."""
        ...


def build(job: JobConfig, model: nn.Module, precision: Precision) -> Strategy:
    """The job's strategy around a model, in a process that may be one of several workers."""
    cuda = job.scale.gpus_per_worker > 0
    if job.scale.strategy == "ddp":
        return DataParallel(job, model, precision, cuda)
    return Zero(job, model, precision, cuda)


def adamw(job: JobConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW over what is trained; no weight decay on biases and norms (every parameter of one dimension)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": job.train.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=job.train.learning_rate,
        eps=job.train.adam_epsilon,
        fused=True,
    )


class DataParallel:
    """Every worker holds the whole model; gradients are averaged. Accelerate on CPU (gloo) and GPU (NCCL)."""

    def __init__(self, job: JobConfig, model: nn.Module, precision: Precision, cuda: bool) -> None:
        from accelerate import Accelerator

        # Without cpu=True, Accelerate on a CPU machine ignores the process group, and workers train apart.
        self._accelerator = Accelerator(cpu=not cuda)
        self.rank = self._accelerator.process_index
        self.workers = self._accelerator.num_processes
        self.device = self._accelerator.device
        self._dtype = _DTYPES.get(precision)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._max_norm = job.train.max_grad_norm
        self.module = model.to(self.device)
        self._optimizer = adamw(job, model)
        self._wrapped: nn.Module = self._accelerator.prepare_model(model) if self.workers > 1 else model
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients(self, inputs: Mapping[str, Tensor], weight: float, last: bool) -> float:
        """See `Strategy`; gradients travel between workers with the last microbatch only."""
        quiet: AbstractContextManager[Any] = nullcontext() if last else self._accelerator.no_sync(self._wrapped)
        with quiet:
            with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not None):
                loss = self._wrapped(**inputs).loss * weight
            self._scaler.scale(loss * self.workers).backward()
        return float(loss.detach())

    def step(self, learning_rate: float) -> float:
        """See `Strategy`."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self._trained, self._max_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def weights(self) -> dict[str, Tensor]:
        """See `Strategy`."""
        if self.rank != 0:
            return {}
        return {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}

    def moments(self) -> dict[str, Tensor]:
        """See `Strategy`."""
        return plain_moments(self.module, self._optimizer) if self.rank == 0 else {}

    def restore(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """See `Strategy`."""
        restore_plain_moments(self.module, self._optimizer, moments, steps)


def plain_moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an optimizer that holds whole parameters."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment].cpu()
        for name, parameter in module.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def restore_plain_moments(
    module: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor], steps: int
) -> None:
    """Put moments into an optimizer that holds whole parameters."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = _adam_state(parameter, steps)
            for moment in MOMENTS:
                optimizer.state[parameter][moment].copy_(moments[f"{moment}.{name}"])


def _adam_state(parameter: Tensor, steps: int) -> dict[str, Tensor]:
    counter = torch.tensor(float(steps), dtype=torch.float32, device=parameter.device)
    return {"step": counter} | {moment: torch.zeros_like(parameter) for moment in MOMENTS}


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

    def _config(self, job: JobConfig, precision: Precision) -> dict[str, Any]:
        rows = -(-job.train.batch_size // (self.workers * self._microbatches))
        zero: dict[str, Any] = {"stage": self.stage}
        if job.scale.offload == "cpu":
            zero["offload_optimizer"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": self._microbatches,
            "gradient_clipping": job.train.max_grad_norm,
            "zero_optimization": zero,
            # torch's AdamW, the same arithmetic as under ddp; also where the optimizer state is offloaded.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {
                "enabled": precision != "fp32",
                "dtype": {"fp16": "float16"}.get(precision, "bfloat16"),
                # Else ZeRO-3 gathers the weights of linear layers in that dtype, for evaluation too.
                "lower_precision_safe_modules": [],
            },
            "steps_per_print": 2**31,
        }

    def gradients(self, inputs: Mapping[str, Tensor], weight: float, last: bool) -> float:
        """See `Strategy`; the engine counts microbatches itself, and divides by their number."""
        loss = self.engine(**inputs).loss * weight
        self.engine.backward(loss * (self.workers * self._microbatches))
        if not last:
            self.engine.step()
        return float(loss.detach())

    def step(self, learning_rate: float) -> float:
        """See `Strategy`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def weights(self) -> dict[str, Tensor]:
        """See `Strategy`; gathered one parameter at a time, frozen ones too."""
        import deepspeed

        state = {name: tensor for name, tensor in self.module.state_dict().items() if self.rank == 0}
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                if self.rank == 0:
                    state[name] = parameter.detach().clone()
        return {name: tensor.cpu() for name, tensor in state.items()}

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
                    gathered[f"{moment}.{name}"] = whole.cpu().reshape(parameter_shape(parameter))
        return gathered

    def restore(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """See `Strategy`."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if self.stage == 0:
            restore_plain_moments(self.module, self.engine.optimizer, moments, steps)
            return
        sharded, adam = self.engine.optimizer, self.engine.optimizer.optimizer
        flat = sharded.fp32_partitioned_groups_flat if self.stage == 3 else sharded.single_partition_of_fp32_groups
        for shard in flat:
            adam.state[shard] = _adam_state(shard, steps)
        self._link()
        for name, parameter in self._trained():
            for moment in MOMENTS:
                value = moments[f"{moment}.{name}"].to(self.device)
                safe_set_full_optimizer_state(parameter, value, moment)

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


def parameter_shape(parameter: nn.Parameter) -> torch.Size:
    """The whole shape of a parameter that ZeRO-3 may have cut into pieces."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
