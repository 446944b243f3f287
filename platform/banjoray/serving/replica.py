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

    def __init__(self, engine: Engine, limits: ServeConfig) -> None:
        self._engine = engine
        self.limits = limits
        self._batcher: Batcher[Feature, np.ndarray] = Batcher(
            engine.forward, limits.max_batch_tokens, engine.cost(), limits.latency_target_ms / 1000
        )
        self.headers = {"x-model-version": str(engine.version), "x-run-id": str(engine.version.lineage["run"])}

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
    def max_length(self) -> int:
        """How many tokens of a text it reads."""
        return self._engine.max_length

    async def answer(self, ask: Ask) -> Answered:
        """The whole answer; raises RequestError: rows or parameters that can't be answered."""
        rows = await encoded(self._engine, ask.rows)
        outputs = await self._batcher.outputs([feature for row in rows for feature in row])
        return Answered(self._engine.answer(ask, rows, outputs), rows, outputs)

    async def stream(self, ask: Ask) -> AsyncGenerator[Any, None]:
        """The pieces of the answer, as the task tells them; raises RequestError before the first of them."""
        rows = await encoded(self._engine, ask.rows)
        return self._batcher.stream(self._engine.streamed(ask, rows))
