"""One loaded version that answers what requests ask, whatever protocol they came by. Knows nothing of Ray or HTTP."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from banjoray.config.serve import ServeConfig
from banjoray.data.tokens import Feature
from banjoray.registry import ModelVersion
from banjoray.serving.choosing import Chosen
from banjoray.serving.encoding import encoded
from banjoray.serving.engine import Engine
from banjoray.serving.limits import Entry, Queue
from banjoray.serving.sharing import Owned, Shares
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


class Served:
    """Encodes the rows of a request, waits for their share of a batch, answers: the way of every protocol.

    ``queue``, and ``shares``, which knows whose rows go into one batch, are those of the replica. Measures the engine's
    passes when it is made, which takes a moment.
    """

    def __init__(self, engine: Engine, limits: ServeConfig, queue: Queue[Owned, np.ndarray], shares: Shares) -> None:
        self.engine = engine
        self.limits = limits
        self._queue = queue
        self._member = shares.join(engine)
        self._batcher = self._member.group.batcher
        self.headers = {"x-model-version": str(engine.version), "x-run-id": str(engine.version.lineage["run"])}
        self.told: Callable[[Ask, Answered], None] = silent
        """Is told of every whole answer, and must not wait."""

    @property
    def version(self) -> ModelVersion:
        """What answers."""
        return self.engine.version

    @property
    def chosen(self) -> Chosen:
        """Which engine computes, and why."""
        return self.engine.chosen

    @property
    def task(self) -> Task:
        """What it was trained for."""
        return self.engine.task

    @property
    def labels(self) -> Sequence[str]:
        """The names of its labels, in their order; none where its task has none."""
        return self.engine.labels

    @property
    def tokenizer(self) -> Any:
        """The version's own."""
        return self.engine.tokenizer

    @property
    def max_length(self) -> int:
        """How many tokens of a text it reads."""
        return self.engine.max_length

    @property
    def cells(self) -> Sequence[str]:
        """What a row of a request is made of."""
        return self.engine.cells

    async def answer(self, ask: Ask) -> Answered:
        """The whole answer; raises RequestError: rows or parameters that can't be answered, or too many of them."""
        rows = await self._encoded(ask)
        outputs = await self._queue.outputs(self._batcher, [feature for row in rows for feature in row])
        answered = Answered(self.engine.answer(ask, rows, outputs), rows, outputs)
        self.told(ask, answered)
        return answered

    async def beside(self, ask: Ask) -> Answered:
        """The same for nobody: it is not counted, timed or told as a request's."""
        rows = await self._features(ask.rows)
        outputs = await self._batcher.outputs([Entry(feature) for row in rows for feature in row])
        return Answered(self.engine.answer(ask, rows, outputs), rows, outputs)

    async def stream(self, ask: Ask) -> AsyncGenerator[Any, None]:
        """The pieces of the answer, as the task tells them; raises RequestError before the first of them."""
        rows = await self._encoded(ask)
        return self._queue.stream(self._batcher.stream(self.engine.streamed(ask, rows)))

    def shares(self) -> dict[str, int]:
        """The versions that its rows share passes with, and how many of the lowest blocks."""
        return self._member.shares()

    async def _encoded(self, ask: Ask) -> list[list[Owned]]:
        return await self._queue.encoded(self._features, ask.rows)

    async def _features(self, rows: Sequence[dict[str, Any]]) -> list[list[Owned]]:
        return self._member.owned(await encoded(self.engine, rows))


def silent(ask: Ask, answered: Answered) -> None:
    """What is told where no shadow compares."""
