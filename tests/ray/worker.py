"""One worker of a run without Ray: does the cases of a plan, one after the other, and writes what this rank saw.

Run as a script by the fixture `launch`, with the process group's RANK and WORLD_SIZE in the environment, as torchrun
sets them.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.models import vocabulary
from banjoray.training import loop, scoring, strategies
from banjoray.training.interface import Callbacks
from banjoray.training.parallel import DataParallel, FullySharded
from banjoray.training.preflight import prepare
from banjoray.training.strategies import Strategy
from banjoray.training.zero import Zero


class Interrupted(Exception):
    """Stands for a kill: the run ends here, wherever that is."""


@dataclass(frozen=True)
class Seen:
    """What one rank knows of its strategy once the run is over.

    ``wrapped`` is the class that takes part in the exchange; ``held`` counts the numbers of AdamW's first moment on
    this rank and ``trainable`` those of the whole model; ``released`` names the parameters that were not whole here
    after the last step, and ``pieces`` counts the numbers of the part of every parameter that this rank owns (ZeRO-3).
    """

    wrapped: str
    workers: int
    stage: int | None
    held: int
    trainable: int
    released: tuple[str, ...]
    pieces: int


def main(plan: Path) -> None:
    """Every case of the plan, in its order, with the other ranks."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    # Many small passes, so that the rows of an evaluation don't divide evenly between ranks.
    scoring.EVALUATION_TOKENS = 256
    for case in json.loads(plan.read_text()):
        _run(case, plan.parent)
    torch.distributed.destroy_process_group()


def _run(case: dict[str, Any], out: Path) -> None:
    job = validate(JobConfig, case["job"], case["name"])
    vocabulary.LARGEST_SHARE = case.get("largest_share", 0.8)
    ready = prepare(job)
    built: list[Strategy] = []
    released: list[str] = []

    def build(job: JobConfig, model: nn.Module, precision: strategies.Precision) -> Strategy:
        built.append(_watched(strategies.build(job, model, precision), case.get("interrupt_at"), released))
        return built[-1]

    loop.build = build  # type: ignore[attr-defined]
    notes: list[str] = []
    callbacks = Callbacks(watch=lambda moment: notes.append(moment.note))
    told: dict[str, Any] = {}
    try:
        result = loop.fit(job, ready.rows, ready.task, ready.start, case["run"], callbacks)
        told = {"checkpoint": result.checkpoint.name, "metrics": result.checkpoint.metrics, "steps": result.steps}
    except Interrupted:
        told = {"checkpoint": None}
    strategy = built[-1]
    told |= {"seen": asdict(_look(strategy, released)), "note": notes[-1] if notes else ""}
    _write(out / f"{case['name']}.rank{strategy.rank}", told, _own_weights(strategy))


def _watched(strategy: Strategy, interrupt_at: int | None, released: list[str]) -> Strategy:
    """The strategy; it raises on every rank when it is asked for step ``interrupt_at``, and keeps ``released``."""
    step, calls = strategy.step, [0]

    def watched(learning_rate: float) -> float:
        calls[0] += 1
        if calls[0] == interrupt_at:
            raise Interrupted
        norm = step(learning_rate)
        released[:] = [name for name, p in strategy.module.named_parameters() if p.numel() < _size(p)]
        return norm

    strategy.step = watched  # type: ignore[method-assign]
    return strategy


def _local(tensor: Any) -> Tensor:
    """The part of a tensor that is on this rank."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _size(parameter: nn.Parameter) -> int:
    size: int = getattr(parameter, "ds_numel", parameter.numel())
    return size


def _piece(parameter: Any) -> int:
    return int(parameter.ds_tensor.numel())


def _look(strategy: Strategy, released: list[str]) -> Seen:
    parameters = list(strategy.module.parameters())
    if isinstance(strategy, DataParallel):
        kind, stage, optimizer = type(strategy._wrapped), None, strategy._optimizer
    elif isinstance(strategy, FullySharded):
        kind, stage, optimizer = type(strategy.module).__mro__[1], None, strategy._optimizer
    else:
        assert isinstance(strategy, Zero)
        kind, stage = type(strategy.engine), strategy.engine.zero_optimization_stage()
        optimizer = strategy.engine.optimizer.optimizer if stage else strategy.engine.optimizer
    return Seen(
        wrapped=f"{kind.__module__}.{kind.__name__}",
        workers=strategy.workers,
        stage=stage,
        held=sum(_local(state["exp_avg"]).numel() for state in optimizer.state.values()),
        trainable=sum(_size(p) for p in parameters if p.requires_grad),
        released=tuple(released),
        pieces=sum(_piece(p) for p in parameters) if stage == 3 else 0,
    )


def _own_weights(strategy: Strategy) -> dict[str, Tensor]:
    """Every weight as this rank sees it; what ZeRO-3 has cut up is put together on each rank."""
    import deepspeed

    whole: dict[str, Tensor] = {}
    for name, parameter in strategy.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):
            full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            whole[name] = full.detach().clone()
    return whole


def _write(stem: Path, told: dict[str, Any], weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    stem.with_name(f"{stem.name}.json").write_text(json.dumps(told))
    save_file(weights, stem.with_name(f"{stem.name}.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # gloo's threads and DeepSpeed's exit hooks have nothing left to do, and take seconds.
    os._exit(0)
