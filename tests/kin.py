"""Versions that began as one base: random weights, the same up to some block, each with a head of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from banjoray.models.readout import read_first_only
from banjoray.serving.costs import FREE
from banjoray.serving.engine import Engine
from banjoray.serving.replica import Slot
from factories import DEPTH
from replicas import InProcess, encoder


def kin(folder: Path, name: str, task: str = "text-classification", same: int = DEPTH, seed: int = 1) -> Engine:
    """``name``@1 for a task: a tiny BERT whose blocks above ``same`` and whose head are those of ``seed``."""
    engine = encoder(folder, task)
    _redraw(engine.model, same, seed)
    read_first_only(engine.model)
    engine.version = replace(engine.version, model=name)
    # Passes of any size are as good as any other: what stands in a batch depends on no clock.
    vars(engine)["cost"] = lambda: FREE
    return engine


def _redraw(model: Any, same: int, seed: int) -> None:
    """Weights by their names' order: what is below depends on nothing that is above, nor on the kind of head."""
    base = model.base_model
    heads = {id(parameter) for parameter in model.parameters()} - {id(parameter) for parameter in base.parameters()}
    with torch.no_grad():
        common, above = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
        for name, parameter in base.named_parameters():
            stack, _, rest = name.partition("layer.")
            own = (bool(rest) and int(rest.partition(".")[0]) >= same) or stack.startswith("pooler")
            _draw(parameter, above if own else common, name)
        for name, parameter in model.named_parameters():
            if id(parameter) in heads:
                _draw(parameter, above, name)


def _draw(parameter: torch.nn.Parameter, generator: torch.Generator, name: str) -> None:
    around = 1.0 if name.endswith("LayerNorm.weight") else 0.0
    parameter.copy_(around + 0.3 * torch.randn(parameter.shape, generator=generator))


@contextmanager
def many(*engines: Engine, **limits: Any) -> Iterator[InProcess]:
    """A replica that holds several versions, each in a slot of its own; closed at the end."""
    asked = InProcess(engines[0], **limits)
    asked.replica.slots = {engines[0].version.model: Slot(asked.served)}
    for engine in engines[1:]:
        asked.replica.slots[engine.version.model] = Slot(asked.replica.serve(engine))
    try:
        yield asked
    finally:
        asked.close()
