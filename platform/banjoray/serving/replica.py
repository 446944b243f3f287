"""One loaded version that answers what requests ask, whatever protocol they came by. Knows nothing of Ray or HTTP."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from banjoray.config.serve import ServeConfig
from banjoray.data.tokens import Feature
from banjoray.registry import ModelVersion
from banjoray.serving.batching import Batcher
from banjoray.serving.choosing import Chosen
from banjoray.serving.encoding import encoded
from banjoray.serving.engine import Engine
from banjoray.serving.limits import Entry, Queue
from banjoray.serving.security import NONE, Keys
from banjoray.serving.telemetry import Telemetry
from banjoray.tasks.task import Ask, Task


@dataclass(frozen=True)
class Answered:
    """An answer as the task has it, and what it was made of: the features of every row, the outputs of all of them."""

    body: Any
    rows: Sequence[Sequence[Feature]]
    outputs: Sequence[np.ndarray]

    @property
    def tokens_read(self) -> int:
        """How many tokens the model was given, padding not counted."""
        return sum(len(feature) for row in self.rows for feature in row)


class Replica:
    """Encodes the rows of a request, waits for their share of a batch, answers: the way of every protocol."""

    def __init__(self, engine: Engine, limits: ServeConfig, name: str = "") -> None:
        self._engine = engine
        self.limits = limits
        self.keys = None if limits.api_keys in (None, NONE) else Keys(limits.api_keys)
        self.telemetry = Telemetry(limits, name, self._told)
        self._queue: Queue[Feature, np.ndarray] = Queue(limits, self.telemetry)
        self._batcher: Batcher[Entry[Feature], np.ndarray] = Batcher(
            self._queue.timed(engine.forward), limits.max_batch_tokens, engine.cost(), limits.latency_target_ms / 1000
        )
        self.headers = {"x-model-version": str(engine.version), "x-run-id": str(engine.version.lineage["run"])}

    def _told(self) -> dict[str, str]:
        """What answers now, for metrics and the log."""
        version = self.version
        return {"model": version.model, "version": str(version), "run": str(version.lineage["run"])}

    @property
    def version(self) -> ModelVersion:
        """What answers."""
        return self._engine.version

    @property
    def chosen(self) -> Chosen:
        """Which engine computes, and why."""
        return self._engine.chosen

    @property
    def task(self) -> Task:
        """What it was trained for."""
        return self._engine.task

    @property
    def labels(self) -> Sequence[str]:
        """The names of its labels, in their order; none where its task has none."""
        return self._engine.labels

    @property
    def tokenizer(self) -> Any:
        """The version's own."""
        return self._engine.tokenizer

    @property
    def cells(self) -> Sequence[str]:
        """What a row of a request is made of."""
        return self._engine.cells

    @property
    def max_length(self) -> int:
        """How many tokens of a text it reads."""
        return self._engine.max_length

    async def answer(self, ask: Ask) -> Answered:
        """The whole answer; raises RequestError: rows or parameters that can't be answered, or too many of them."""
        rows = await self._encoded(ask)
        outputs = await self._queue.outputs(self._batcher, [feature for row in rows for feature in row])
        return Answered(self._engine.answer(ask, rows, outputs), rows, outputs)

    async def stream(self, ask: Ask) -> AsyncGenerator[Any, None]:
        """The pieces of the answer, as the task tells them; raises RequestError before the first of them."""
        rows = await self._encoded(ask)
        return self._queue.stream(self._batcher.stream(self._engine.streamed(ask, rows)))

    async def _encoded(self, ask: Ask) -> list[list[Feature]]:
        return await self._queue.encoded(lambda rows: encoded(self._engine, rows), ask.rows)
