"""The sections of a job file that say how a model learns: what is trained, how weights change, on how many workers."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from banjoray.config.metrics import MINIMISED
from banjoray.config.section import Section


class FreezeLayers(Section):
    """Freeze the embeddings and the lowest blocks."""

    layers: int = Field(ge=0, description="How many blocks, counted from the bottom; the embeddings freeze too.")


class FreezePatterns(Section):
    """Freeze what matches."""

    patterns: list[str] = Field(min_length=1, description="Shell patterns over parameter names, as encoder.layer.0.*")


class FreezeBitfit(Section):
    """Freeze everything but biases and the head (Ben Zaken et al. 2022, arXiv:2106.10199)."""

    bitfit: Literal[True] = Field(description="true: train biases and the head alone.")


Freeze = Literal["none", "embeddings", "backbone"] | FreezeLayers | FreezePatterns | FreezeBitfit


def clear_freeze(value: Any) -> Any:
    """``value`` if it has the shape of a `Freeze`; pydantic would explain every member of the union instead."""
    if isinstance(value, Section) or value in ("none", "embeddings", "backbone"):
        return value
    match value:
        case {"layers": int(count)} if len(value) == 1 and count >= 0 and count is not True and count is not False:
            return value
        case {"patterns": [*patterns]} if len(value) == 1 and patterns and all(isinstance(p, str) for p in patterns):
            return value
        case {"bitfit": True} if len(value) == 1:
            return value
    raise ValueError(
        f"found {value!r}, needed none, embeddings, backbone, {{layers: k}}, {{patterns: [...]}} or {{bitfit: true}}"
    )


class AdapterConfig(Section):
    """Small matrices beside frozen weights, by PEFT; they and the head are all that is trained."""

    type: Literal["lora", "dora", "ia3"] = Field(
        "lora", description="lora (arXiv:2106.09685), dora (arXiv:2402.09353) or ia3 (arXiv:2205.05638)."
    )
    r: int = Field(8, ge=1, description="Rank of the added matrices; ia3 has none.")
    alpha: float = Field(16, gt=0, description="Their product is scaled by alpha / r; ia3 has none.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout before them; ia3 has none.")
    target_modules: Literal["auto"] | list[str] = Field(
        "auto", description="Names of the linear layers that get one; auto: PEFT's choice for the architecture."
    )
    merge: bool = Field(
        True, description="A version holds merged weights; false: the PEFT adapter too, in its folder adapter/."
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, list) and value and all(isinstance(name, str) for name in value)):
            return value
        raise ValueError(f"found {value!r}, needed auto or a list of module names")


class BatchingConfig(Section):
    """What a batch is: a number of rows, or as many rows as fit."""

    mode: Literal["rows", "tokens"] = Field(
        "rows", description="rows: train.batch_size rows a step; tokens: rows x longest <= max_tokens a step."
    )
    max_tokens: int = Field(
        4096, ge=1, description="Padded tokens of an optimizer step, over all workers; read in mode tokens."
    )


class MaskingConfig(Section):
    """Which tokens fill-mask hides: 80 % behind the mask token, 10 % behind another word; 10 % stand as they are."""

    share: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="Share of the tokens of a text (special ones apart) that have to be found; at least one.",
    )
    whole_words: bool = Field(
        False,
        description="Hide all tokens of a word together; the last word chosen may be cut, so that the number fits.",
    )


class TrainConfig(Section):
    """How the weights are changed."""

    epochs: int = Field(3, ge=1, description="Passes over the training rows.")
    batch_size: int = Field(32, ge=1, description="Rows per optimizer step, over all workers and accumulation.")
    batching: BatchingConfig = Field(default_factory=BatchingConfig, description="What a batch is.")
    learning_rate: float = Field(2.0e-5, gt=0, description="AdamW's peak learning rate.")
    layerwise_lr_decay: float = Field(
        1.0, gt=0, le=1, description="Each block learns at this much of the rate of the block above it."
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay; none on biases and norms.")
    adam_epsilon: float = Field(1.0e-8, gt=0, description="AdamW's epsilon.")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = Field(
        "linear", description="How the learning rate goes on after the warm-up (transformers.get_scheduler)."
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of all steps over which the rate rises from 0.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Microbatches per worker and optimizer step.")
    gradient_checkpointing: bool = Field(False, description="Compute activations twice to keep fewer of them.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this L2 norm.")
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the hardware has it natively, else fp16 on CUDA, else fp32."
    )
    torch_compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="torch.compile of the model; auto: on GPUs under ddp, in runs of 20,000 steps and more: "
        "compiling takes minutes, and on CPUs it gains 3 %.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of each target spread over all labels; of several labels, over yes and no of each.",
    )
    masking: MaskingConfig = Field(default_factory=MaskingConfig, description="Which words fill-mask hides.")
    class_weights: Literal["none", "balanced"] | dict[str, float] = Field(
        "none", description="Weight of a row by its label: balanced (rows / (labels x rows of it)), or label: weight."
    )
    max_skipped_steps: int = Field(
        0, ge=0, description="Steps whose gradients are no numbers that are skipped before the run stops."
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after this many epochs without a better metric; null: train all epochs."
    )
    seed: int = Field(0, ge=0, description="Seeds the head, the data order, dropout and the validation cut.")
    metric: str = Field(
        "auto", description="The validation metric that picks the best checkpoint; auto: the task's usual one."
    )
    mode: Literal["max", "min"] = Field(
        "max", description="Whether more of the metric is better, or less; follows from the metric."
    )
    checkpoint_every: Literal["epoch"] | int = Field(
        "epoch", description="epoch, or a number of steps: how much work a crash can cost. Epochs are always kept."
    )
    keep_checkpoints: int = Field(2, ge=2, description="Complete checkpoints on disk: the best, and the newest.")
    checkpoint_budget_gib: float | None = Field(
        None, gt=0, description="Disk space of a run's checkpoints, the one being written too; null: no limit."
    )

    @model_validator(mode="before")
    @classmethod
    def _mode_follows(cls, value: Any) -> Any:
        if isinstance(value, dict) and "mode" not in value and value.get("metric") in MINIMISED:
            return value | {"mode": "min"}
        return value

    @model_validator(mode="after")
    def _losses_are_minimised(self) -> "TrainConfig":
        if (self.metric in MINIMISED) != (self.mode == "min"):
            raise ValueError(
                f"metric {self.metric!r} with mode {self.mode!r}; only {', '.join(MINIMISED)} are minimised"
            )
        return self

    @field_validator("checkpoint_every")
    @classmethod
    def _at_least_one_step(cls, value: Literal["epoch"] | int) -> Literal["epoch"] | int:
        if value != "epoch" and value < 1:
            raise ValueError(f"needs 'epoch' or a number of steps >= 1, found {value}")
        return value

    @field_validator("torch_compile", mode="before")
    @classmethod
    def _yaml_booleans(cls, value: Any) -> Any:
        # YAML 1.1 reads on and off as true and false.
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("class_weights", mode="before")
    @classmethod
    def _positive_weights(cls, value: Any) -> Any:
        kinds = (int, float)
        numbers = isinstance(value, Mapping) and all(type(w) in kinds and 0 < w < math.inf for w in value.values())
        if value in ("none", "balanced") or (numbers and value):
            return value
        raise ValueError(f"found {value!r}, needed none, balanced, or a weight above 0 for labels")


class ScaleConfig(Section):
    """How many workers train, on what, and how they share the work."""

    workers: int | tuple[int, int] = Field(
        1, description="Training processes; [least, most]: as many of them as the cluster is large enough for."
    )
    gpus_per_worker: int = Field(0, ge=0, le=1, description="1: train on GPUs; 0: on CPUs.")
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores, and CPU threads, of each worker.")
    strategy: Literal["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"] = Field(
        "ddp",
        description="ddp: data parallel. fsdp: PyTorch's FSDP2. zero1..zero3: DeepSpeed, sharding optimizer, "
        "gradients, parameters.",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where ZeRO keeps the optimizer state: cpu: host memory; nvme: files in nvme_path."
    )
    nvme_path: str | None = Field(None, description="Folder on a fast local disk for offload nvme.")
    max_failures: int = Field(2, ge=0, description="How many times a dead worker restarts the run from a checkpoint.")
    collective_timeout_s: int = Field(
        600, ge=5, description="How long a worker waits for the others in one exchange before the run is restarted."
    )

    @field_validator("workers", mode="before")
    @classmethod
    def _some_workers(cls, value: Any) -> Any:
        bounds = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
        if all(isinstance(one, int) and not isinstance(one, bool) for one in bounds) and 1 <= bounds[0] <= bounds[1]:
            return value
        raise ValueError(f"found {value!r}, needed a number >= 1, or [least, most]")

    @property
    def most_workers(self) -> int:
        """The largest number of workers that a run may have."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def least_workers(self) -> int:
        """The number of workers that a run needs to start."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]
