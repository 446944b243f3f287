"""What a model takes as a job would train it: in the memory of a worker, and in a checkpoint.

Memory is an estimate. Weights, gradients and AdamW's moments are counted as the ZeRO paper counts them (Rajbhandari et
al. 2020, arXiv:1910.02054), in fp32, which every strategy keeps under autocast; activations as `Activations` says. Not
counted: what libraries take, what zero3 and fsdp gather for the block at work and, in host memory, the words that no
text uses.
"""

from dataclasses import dataclass
from typing import Any

import torch

from banjoray.config.job import JobConfig
from banjoray.errors import ModelError
from banjoray.models.blocks import find_blocks
from banjoray.models.freezing import count_weights, freeze_parameters
from banjoray.models.loading import base_config, sketch
from banjoray.models.prefix import frozen_depth
from banjoray.models.vocabulary import Vocabulary, narrow
from banjoray.training.interface import Rows
from banjoray.training.learned import Learned
from banjoray.training.preflight import Ready
from banjoray.training.strategies import choose_precision

GIB = 2**30
# Bytes of a number.
FLOAT, HALF = 4, 2
# Numbers per token and unit of width that a block keeps for its backward pass, by their bytes: measured on BERT with
# saved_tensors_hooks, and in fp32 as many as in Korthikanti et al. 2022 (arXiv:2205.05198). Autocast leaves norms and
# sums in fp32; they count twice here.
NUMBERS = {FLOAT: 17, HALF: 22}
# Matrices (heads, tokens, tokens) that attention keeps beside them. GPUs have a fused kernel, which keeps none.
MATRICES = {FLOAT: 2, HALF: 3}
# Of what a strategy cuts up, each worker holds its part.
CUT_UP: dict[str, tuple[str, ...]] = {
    "ddp": (),
    "fsdp": ("weights", "gradients", "optimizer"),
    "zero0": (),
    "zero1": ("optimizer",),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer"),
}
# Bytes per trained weight beside AdamW's moments: stages 1 and 2 change a copy of the weights, and write it back
# (DeepSpeed 0.19.8, also where both are fp32).
COPY = {"zero1": FLOAT, "zero2": FLOAT}
# Bytes of DeepSpeed's buffer for gradients on their way (reduce_bucket_size). A CPU gives it memory as it is used.
BUCKET = FLOAT * 500_000_000
BUCKETED = ("zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Shape:
    """The model of a job without memory behind its weights, as training would change it; ``weights`` are all it had."""

    job: JobConfig
    rows: Rows
    model: Any
    vocabulary: Vocabulary | None
    weights: int

    @property
    def trained(self) -> int:
        """How many weights change: of the word table, those of the words in use."""
        return count_weights(self.model)[0]


@dataclass(frozen=True)
class Activations:
    """What blocks keep of the largest microbatch for the backward pass, an estimate: the product of all parts.

    ``numbers_per_block`` are per token and unit of width. With ``checkpointing`` every block keeps its inputs alone,
    and the block at work all.
    """

    rows: int
    tokens: int
    width: int
    blocks: int
    numbers_per_block: float
    bytes_per_number: int
    checkpointing: bool

    @property
    def numbers(self) -> float:
        """How many numbers all blocks keep per token and unit of width."""
        if self.checkpointing and self.blocks:
            return self.blocks + self.numbers_per_block
        return self.blocks * self.numbers_per_block

    @property
    def bytes(self) -> int:
        """All of it."""
        return round(self.rows * self.tokens * self.width * self.numbers * self.bytes_per_number)


@dataclass(frozen=True)
class Memory:
    """What one worker holds under a strategy, in GiB; ``chosen`` is the job's own.

    ``buffers``: weights in half precision, which autocast makes and backward needs, and gradients on their way.
    """

    strategy: str
    chosen: bool
    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    buffers_gib: float
    activations_gib: float

    @property
    def total_gib(self) -> float:
        """All of it."""
        return self.weights_gib + self.gradients_gib + self.optimizer_gib + self.buffers_gib + self.activations_gib


def shaped(job: JobConfig, ready: Ready) -> Shape:
    """Freeze or adapt and narrow a sketch of the base, as training does with the base."""
    rows = ready.rows
    model = sketch(base_config(ready.base, job, rows.labels, rows.pad_id), ready.task, job.model.trust_remote_code)
    if job.adapter is None:
        freeze_parameters(model, job.freeze)
    else:
        from banjoray.models.adapters import attach

        attach(model, job.adapter, job.freeze, job.train.seed)
    weights = count_weights(model)[1]
    ids = (part.streams["input_ids"] for part in (rows.train, rows.validation))
    vocabulary = narrow(model, ids) if ready.task.steady else None
    return Shape(job, rows, model, vocabulary, weights)


def memory(shape: Shape, strategy: str, kept: Activations) -> Memory:
    """What one of the job's workers would hold under ``strategy``; of activations ``kept``."""
    scale = shape.job.scale
    trained, weights = count_weights(shape.model)
    sizes = {
        "weights": FLOAT * weights,
        "gradients": FLOAT * trained,
        # AdamW's two moments.
        "optimizer": (2 * FLOAT + COPY.get(strategy, 0)) * trained,
    }
    parts = {name: size / (scale.least_workers if name in CUT_UP[strategy] else 1) for name, size in sizes.items()}
    if scale.gpus_per_worker and scale.offload != "none" and strategy in BUCKETED:
        parts["optimizer"] = 0
    buffers = copies_bytes(shape) + (BUCKET if scale.gpus_per_worker and strategy in BUCKETED else 0)
    chosen = strategy == scale.strategy
    gib = (parts["weights"], parts["gradients"], parts["optimizer"], buffers, kept.bytes)
    return Memory(strategy, chosen, *(size / GIB for size in gib))


def activations(shape: Shape, microbatch: tuple[int, int]) -> Activations:
    """What the blocks above the frozen bottom keep of a microbatch (rows, tokens)."""
    rows, tokens = microbatch
    config, size = shape.model.config, _bytes_per_number(shape.job)
    blocks, width = _blocks(shape.model) - (frozen_depth(shape.model) or 0), int(config.hidden_size)
    heads = 0 if shape.job.scale.gpus_per_worker else int(getattr(config, "num_attention_heads", 0))
    numbers = NUMBERS[size] + MATRICES[size] * heads * tokens / width
    return Activations(rows, tokens, width, blocks, numbers, size, shape.job.train.gradient_checkpointing)


def copies_bytes(shape: Shape) -> int:
    """What autocast's copies of the weights of the blocks above the frozen bottom take; 0 in fp32."""
    if _bytes_per_number(shape.job) == FLOAT:
        return 0
    try:
        stack = shape.model.base_model.get_submodule(find_blocks(shape.model).stack)
    except ModelError:
        return HALF * count_weights(shape.model)[1]
    above = list(stack)[frozen_depth(shape.model) or 0 :]
    return HALF * sum(int(parameter.numel()) for block in above for parameter in block.parameters())


def _bytes_per_number(job: JobConfig) -> int:
    return HALF if precision(job) in ("bf16", "fp16") else FLOAT


def checkpoint_bytes(shape: Shape) -> int:
    """What a checkpoint holds: the weights that change, the head, and AdamW's moments."""
    state = shape.model.state_dict()
    kept = (state[name] for name in Learned.of(shape.model, shape.vocabulary).kept)
    size = sum(int(part.numel()) * (FLOAT if part.is_floating_point() else int(part.element_size())) for part in kept)
    rows: int = shape.vocabulary.rows.nbytes if shape.vocabulary else 0
    return size + rows + 2 * FLOAT * shape.trained


def precision(job: JobConfig) -> str:
    """What ``train.precision`` is expected to come to where the workers run."""
    if job.train.precision == "auto" and job.scale.gpus_per_worker and not torch.cuda.is_available():
        # The GPUs are elsewhere; those made since 2020 multiply bf16.
        return "bf16"
    return choose_precision(job).precision


def _blocks(model: Any) -> int:
    """How many blocks a row goes through; an encoder-decoder's decoder counts as much as its encoder."""
    try:
        found = find_blocks(model)
    except ModelError:
        return int(getattr(model.config, "num_hidden_layers", 0))
    depth = int(model.config.num_hidden_layers) if found.shared else found.depth
    return 2 * depth if getattr(model.config, "is_encoder_decoder", False) else depth
