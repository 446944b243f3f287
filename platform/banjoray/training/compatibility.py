"""What goes with what: strategy x freeze x adapter x precision x offload x device, and what to change where it doesn't.

One list of rules serves three times: a job that breaks one is refused before anything is read, docs/compatibility.md
is written from it (``make docs``), and tests run every cell that it leaves.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Generic, TypeVar, get_args

from banjoray.config.job import JobConfig
from banjoray.config.train import AdapterConfig, Freeze, ScaleConfig, TrainConfig
from banjoray.errors import ConfigError
from banjoray.tasks.task import varies

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Cell:
    """One way to train. ``freeze`` is the kind of freezing (layers, not how many); ``device`` is cpu or gpu."""

    strategy: str
    freeze: str
    adapter: str
    precision: str
    offload: str
    device: str


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """What is refused, and the line for the user: the key, what was found, why, and what to set instead.

    ``message`` names parts of what is refused as ``{0.part}``.
    """

    refuses: Callable[[Subject], bool]
    message: str

    def line(self, subject: Subject) -> str:
        """The message about ``subject``."""
        return self.message.format(subject)

    def template(self) -> str:
        """The message with <part> where it names what was found."""
        return re.sub(r"\{0\.([a-z_.]+)\}", r"<\1>", self.message).replace("{{", "{").replace("}}", "}")


def _choices(section: type[Any], key: str) -> tuple[str, ...]:
    return get_args(section.model_fields[key].annotation)


def _freeze_kinds() -> tuple[str, ...]:
    """The names, then the key of every section that a job can freeze by."""
    names, *sections = get_args(Freeze)
    return (*get_args(names), *(next(iter(section.model_fields)) for section in sections))


# The values of every part of a cell, read from the config, so that a new one can't be left out; and its key in a job.
AXES = {
    "strategy": _choices(ScaleConfig, "strategy"),
    "freeze": _freeze_kinds(),
    "adapter": ("none", *_choices(AdapterConfig, "type")),
    "precision": tuple(name for name in _choices(TrainConfig, "precision") if name != "auto"),
    "offload": _choices(ScaleConfig, "offload"),
    "device": ("cpu", "gpu"),
}
KEYS = {
    "strategy": "scale.strategy",
    "freeze": "freeze",
    "adapter": "adapter.type",
    "precision": "train.precision",
    "offload": "scale.offload",
    "device": "scale.gpus_per_worker",
}

# What is refused does something else than it says, or was never seen to work; every cell that is left is run by a test.
RULES: tuple[Rule[Cell], ...] = (
    Rule(
        lambda cell: cell.offload != "none" and cell.strategy not in ("zero1", "zero2", "zero3"),
        "scale.offload: found {0.offload} with scale.strategy {0.strategy}; only ZeRO stages 1 to 3 keep optimizer "
        "state elsewhere; set scale.strategy=zero3 (zero1 and zero2 go with offload cpu too), or scale.offload=none",
    ),
    Rule(
        lambda cell: cell.offload == "nvme" and cell.strategy in ("zero1", "zero2"),
        "scale.offload: found nvme with scale.strategy {0.strategy}, under which DeepSpeed keeps the state in host "
        "memory and writes no file; set scale.strategy=zero3, or scale.offload=cpu",
    ),
    Rule(
        lambda cell: cell.offload == "nvme" and cell.device == "cpu",
        "scale.offload: found nvme with scale.gpus_per_worker 0; only the optimizer state of GPU workers is kept in "
        "files; set scale.offload=none, or scale.gpus_per_worker=1",
    ),
    Rule(
        lambda cell: cell.precision == "fp16" and cell.strategy != "ddp",
        "train.precision: found fp16 with scale.strategy {0.strategy}; fp16 needs a loss scale, or small gradients "
        "become 0, and banjoray has one under ddp alone; set train.precision=bf16 (or fp32), or scale.strategy=ddp",
    ),
    Rule(
        lambda cell: cell.precision == "tf32" and cell.device == "cpu",
        "train.precision: found tf32 with scale.gpus_per_worker 0; only GPUs have it (Ampere and later); "
        "set train.precision=fp32, or scale.gpus_per_worker=1",
    ),
    Rule(
        lambda cell: cell.adapter != "none" and cell.freeze not in ("none", "layers"),
        "freeze: found {0.freeze} with adapter.type {0.adapter}; an adapter freezes all other weights itself; "
        "set freeze=none, or freeze={{layers: k}} for adapters above the lowest k blocks, or leave adapter out",
    ),
)

# Rules about keys that are no part of a cell.
JOB_RULES: tuple[Rule[JobConfig], ...] = (
    Rule(
        lambda job: job.scale.offload == "nvme" and job.scale.nvme_path is None,
        "scale.nvme_path: found none with scale.offload nvme; set scale.nvme_path to a folder on a fast local disk of "
        "every node, or scale.offload=cpu",
    ),
    Rule(
        lambda job: job.scale.offload != "nvme" and job.scale.nvme_path is not None,
        "scale.nvme_path: found {0.scale.nvme_path} with scale.offload {0.scale.offload}, which reads no path; "
        "set scale.offload=nvme, or leave scale.nvme_path out",
    ),
    Rule(
        lambda job: job.train.max_skipped_steps > 0 and job.scale.strategy == "zero0",
        "train.max_skipped_steps: found {0.train.max_skipped_steps} with scale.strategy zero0, under which DeepSpeed "
        "makes a step without numbers all the same, and the weights are lost; set train.max_skipped_steps=0, or "
        "scale.strategy=ddp, which computes the same",
    ),
    Rule(
        lambda job: job.train.torch_compile == "on" and job.scale.strategy != "ddp",
        "train.torch_compile: found on with scale.strategy {0.scale.strategy}, whose hooks run between the layers; "
        "set train.torch_compile=off, or scale.strategy=ddp",
    ),
    Rule(
        lambda job: job.cache.prefix == "always" and varies(job),
        "cache.prefix: found always with task {0.task}, which gives the model a row in other ways than by its words "
        "alone (masks, pairs, packed blocks), so that a frozen bottom's states can't be kept; set cache.prefix=auto",
    ),
)


def cell_of(job: JobConfig, precision: str | None = None) -> Cell:
    """The job's cell; ``precision`` is what auto came to, where that is known.

    Where it isn't, it counts as fp32, which goes with everything: the choice is the worker's, who sees the hardware.
    """
    wanted = precision or job.train.precision
    return Cell(
        strategy=job.scale.strategy,
        freeze=job.freeze if isinstance(job.freeze, str) else next(iter(type(job.freeze).model_fields)),
        adapter=job.adapter.type if job.adapter else "none",
        precision="fp32" if wanted == "auto" else wanted,
        offload=job.scale.offload,
        device="gpu" if job.scale.gpus_per_worker else "cpu",
    )


def cells() -> Iterator[Cell]:
    """Every combination, allowed or not."""
    for values in product(*AXES.values()):
        yield Cell(*values)


def refusals(cell: Cell) -> list[str]:
    """A line for each rule that the cell breaks; none if it is allowed."""
    return [rule.line(cell) for rule in RULES if rule.refuses(cell)]


def check(job: JobConfig, precision: str | None = None) -> None:
    """Refuse keys that don't go together, before anything is read or started; ``precision`` as in `cell_of`.

    Raises ConfigError: one line for each rule that is broken.
    """
    lines = refusals(cell_of(job, precision)) + [rule.line(job) for rule in JOB_RULES if rule.refuses(job)]
    if lines:
        raise ConfigError("\n".join(lines))


def check_budget(job: JobConfig, trainable: int) -> None:
    """Refuse a budget for checkpoints that is too small for a run that changes ``trainable`` weights.

    Each has the weights and AdamW's two moments in fp32; the best one, the newest and the one being written must fit.
    Raises ConfigError.
    """
    found = job.train.checkpoint_budget_gib
    exact = 3 * 12 * max(1, trainable) / 2**30
    # Rounded up to a hundredth, or to two digits where that is finer.
    step = min(0.01, 10.0 ** (math.floor(math.log10(exact)) - 1))
    needed = math.ceil(exact / step) * step
    if found is not None and found < needed:
        raise ConfigError(
            f"train.checkpoint_budget_gib: found {found:g}, needed at least {needed:.6g}: the best checkpoint, the "
            f"newest and the one being written, with {trainable:,} trained weights of 12 bytes each; "
            f"set train.checkpoint_budget_gib={needed:.6g}, freeze more, or train an adapter"
        )


def markdown() -> str:
    """The tables as they stand in docs/compatibility.md, computed by asking the rules about every cell."""
    asked = {cell: [number for number, rule in enumerate(RULES, 1) if rule.refuses(cell)] for cell in cells()}
    allowed = [cell for cell, broken in asked.items() if not broken]
    on_cpu = sum(cell.device == "cpu" for cell in allowed)
    lines = [
        "# What goes with what",
        "",
        "Written by `make docs` from the rules in `platform/banjoray/training/compatibility.py`; don't edit it here.",
        "A job that breaks a rule is refused before anything is read, with the message below.",
        "",
        f"There are {len(asked)} combinations of {', '.join(f'`{key}`' for key in KEYS.values())} (cpu: 0, gpu: 1).",
        f"{len(allowed)} of them are allowed: {on_cpu} on CPUs, with each of which `tests/ray/test_compatibility.py` "
        f"trains on two workers, and {len(allowed) - on_cpu} on GPUs, with each of which `tests/gpu` trains.",
        "",
        "A combination is allowed if each pair of its values is. A number is that of the rule that refuses the pair.",
        "`train.precision: auto` counts as fp32 here: each worker chooses when it sees its hardware.",
    ]
    free = []
    for row, column in combinations(AXES, 2):
        table = {(r, c): _verdict(asked, {row: r, column: c}) for r, c in product(AXES[row], AXES[column])}
        if all(verdict == "yes" for verdict in table.values()):
            free.append((row, column))
            continue
        lines += ["", f"## `{KEYS[row]}` and `{KEYS[column]}`", "", _row(["", *AXES[column]])]
        lines += [_row(["---"] * (len(AXES[column]) + 1))]
        lines += [_row([f"**{r}**", *(table[r, c] for c in AXES[column])]) for r in AXES[row]]
    lines += ["", "## Pairs without a refusal", ""]
    lines += [f"- `{KEYS[row]}` and `{KEYS[column]}`" for row, column in free]
    lines += ["", "## Rules", ""]
    lines += [f"{number}. {_prose(rule.template())}" for number, rule in enumerate(RULES, 1)]
    lines += ["", "Rules about other keys:", ""]
    lines += [f"- {_prose(rule.template())}" for rule in JOB_RULES]
    return "\n".join(lines) + "\n"


def _verdict(asked: dict[Cell, list[int]], pair: dict[str, str]) -> str:
    """yes if some cell with this pair of values is allowed, else what the cells that come closest to it break."""
    broken = {tuple(numbers) for cell, numbers in asked.items() if pair.items() <= vars(cell).items()}
    fewest = min(map(len, broken))
    if not fewest:
        return "yes"
    closest = sorted(numbers for numbers in broken if len(numbers) == fewest)
    return f"no ({' or '.join(' and '.join(map(str, numbers)) for numbers in closest)})"


def _row(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |"


def _prose(message: str) -> str:
    """A message with its key and its placeholders as code."""
    key, _, rest = message.partition(": ")
    return f"`{key}`: " + re.sub(r"<[a-z_.]+>", r"`\g<0>`", rest)
