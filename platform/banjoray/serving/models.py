"""The models of a version by engine and precision, each made when it is asked for, and which of them answers."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from banjoray.errors import ConfigError
from banjoray.models.packed import pack
from banjoray.registry import ModelVersion
from banjoray.serving import int8, onnx
from banjoray.serving.borders import MOST_AGAIN, OnBorders, border_of, share_within
from banjoray.serving.choosing import (
    GRAPH,
    PLAIN,
    Chosen,
    Kind,
    engine_cache,
    fastest_that_agrees,
    kept_file,
    timed,
)
from banjoray.serving.probe import Probe
from banjoray.training.strategies import DTYPES


class Models:
    """What a trained model, in fp32 and evaluation mode, is made into; files are kept in the version's engine cache.

    ``probe`` gives the version's probe rows, if it has any; it is asked only where they are needed.
    """

    def __init__(
        self, version: ModelVersion, root: str, model: Any, tokenizer: Any, probe: Callable[[], Probe | None]
    ) -> None:
        self._version, self._root = version, root
        self._probe = probe
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self.device)
        self._tokenizer = tokenizer

    @cached_property
    def cache(self) -> Path:
        """The folder that holds what is made of the version."""
        return engine_cache(self._root, self._version)

    @cached_property
    def probe(self) -> Probe | None:
        """The probe rows, tokenised; None for a version without."""
        return self._probe()

    def chosen(self, chosen: Chosen) -> Any:
        """The model that was chosen, on its device; raises ConfigError: it can't be made, and why."""
        model = self.of(Kind(chosen.engine, chosen.precision))
        return OnBorders(model, self.of(GRAPH), chosen.border) if chosen.border else model

    def border(self, kind: Kind, model: Any) -> float:
        """Within what distance of a border between labels a kind's rows are computed in fp32 too; 0: none are.

        Only int8 has one, and only where the highest logit of a row is its answer. It is what every second probe row
        shows; the others judge it.
        """
        probe = self.probe
        if probe is None or kind.precision != "int8" or not probe.task.highest_answers or len(probe.tokens) < 2:
            return 0.0
        found, wanted = probe.outputs(model), probe.outputs(self.of(PLAIN))
        border = border_of(found[::2], wanted[::2])
        return border if np.isfinite(border) and share_within(found, border) <= MOST_AGAIN else 0.0

    def of(self, kind: Kind) -> Any:
        """The model of a kind, on its device; raises ConfigError: it can't be made, and why."""
        if kind == PLAIN:
            return self._model
        if kind.engine == "torch":
            short = copy.deepcopy(self._model).to(DTYPES[kind.precision])
            if kind.precision == "bf16" and self.device.type == "cpu":
                pack(short, DTYPES[kind.precision])
            return short
        if missing := onnx.missing_packages():
            raise ConfigError(f"onnx: {missing}")
        try:
            file = self._file(kind.precision)
        except OSError as error:
            raise ConfigError(f"onnx: {self.cache} can't be written to ({error.strerror})") from None
        return onnx.OnnxModel(file, self._model.config, torch.get_num_threads())

    def _file(self, precision: str) -> Path:
        plain = kept_file(self.cache / "fp32.onnx", lambda file: onnx.export(self._model, self._tokenizer, file))
        if precision == "fp32":
            return plain
        return kept_file(
            # Machines that share a registry may differ in it.
            self.cache / f"int8-{int8.bits()}bit.onnx",
            lambda file: int8.to_int8(plain, file, self.probe.outputs if self.probe is not None else None),
        )


def choose(models: Models, kinds: Sequence[Kind]) -> Chosen:
    """The kind that answers: of one, that; of several, the fastest that agrees on the probe rows.

    Without probe rows it is fp32, of torch where that is among ``kinds``. Raises ConfigError: none can be made, or none
    agrees.
    """
    probe = models.probe
    if probe is None:
        safe = next(kind for kind in kinds if kind.precision == PLAIN.precision)
        return Chosen(safe.engine, safe.precision, "the version has no probe rows to compare faster engines by")
    made: dict[Kind, Any] = {}
    borders: dict[Kind, float] = {}
    failed: list[str] = []
    for kind in kinds:
        try:
            model = models.of(kind)
            borders[kind] = models.border(kind, model)
            graph = (made.get(GRAPH) or models.of(GRAPH)) if borders[kind] else None
            made[kind] = OnBorders(model, graph, borders[kind]) if graph else model
        except ConfigError as error:
            failed.append(f"{kind}: {error}")
    if not made:
        raise ConfigError(f"args.engine: none that was asked for can be made; {'; '.join(failed)}")
    times = timed({kind: lambda model=model: probe.pass_over(model) for kind, model in made.items()})  # type: ignore[misc]
    plain = models.of(PLAIN)

    def wrong(kind: Kind) -> str:
        # Rows that a border was drawn by agree in any case.
        judges = slice(1, None, 2) if borders[kind] else slice(None)
        return probe.disagreement(probe.outputs(made[kind]), probe.outputs(plain), judges)

    found = fastest_that_agrees(times, wrong, failed)
    if not (border := borders[Kind(found.engine, found.precision)]):
        return found
    near = f"rows whose two highest logits are within {border:.2g} are computed in fp32 too"
    return replace(found, border=border, why=f"{found.why}; {near}")
