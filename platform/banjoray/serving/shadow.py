"""A version that answers what another one has answered, for nobody to see: how often, and where, they differ."""

import asyncio
from collections import Counter

import numpy as np

from banjoray.errors import RequestError
from banjoray.serving.served import Answered, Served
from banjoray.serving.telemetry import Telemetry
from banjoray.tasks.task import Ask, Task

ALL = "all"


class Shadow:
    """Compares one request at a time, off its path; those that come meanwhile are passed over and counted.

    Requests of other parameters than a model's usual ones are compared like any: what is compared is what the models
    gave, before it was put into words.
    """

    def __init__(self, served: Served, telemetry: Telemetry) -> None:
        self.served = served
        self.rows: Counter[str] = Counter()
        self.differ: Counter[str] = Counter()
        self.passed_over = 0
        self.failed = 0
        self._telemetry = telemetry
        self._running: asyncio.Task[None] | None = None

    def compare(self, ask: Ask, answered: Answered) -> None:
        """Have an answer compared, if nothing else is."""
        if self._running is not None and not self._running.done():
            self.passed_over += 1
            return
        self._running = asyncio.get_running_loop().create_task(self._compare(ask, answered))

    async def _compare(self, ask: Ask, answered: Answered) -> None:
        try:
            self._note(answered, await self.served.beside(ask))
        except RequestError:
            # Rows that this version can't take, a longer limit say, are a difference as well.
            self.failed += 1
        except Exception as error:  # noqa: BLE001  the boundary to the requests, none of which may end by a shadow
            self.failed += 1
            self._telemetry.broken(f"shadow {self.served.version}", error)

    def _note(self, answered: Answered, mine: Answered) -> None:
        left, theirs = iter(mine.outputs), iter(answered.outputs)
        for row, other in zip(answered.rows, mine.rows, strict=True):
            wanted = [next(theirs) for _ in row]
            found = [next(left) for _ in other]
            label = label_of(self.served, wanted)
            same = same_row(self.served.task, found, wanted)
            self.rows[label] += 1
            self.differ[label] += not same
            self._telemetry.shadowed(str(self.served.version), label, same)

    def to_json(self) -> dict[str, object]:
        """How many rows were compared and differ, in all and by the label that the answering version gave."""
        by_label = {label: {"rows": self.rows[label], "differ": self.differ[label]} for label in sorted(self.rows)}
        return {
            "version": str(self.served.version),
            "rows": self.rows.total(),
            "differ": self.differ.total(),
            "by_label": {} if list(by_label) == [ALL] else by_label,
            "passed_over": self.passed_over,
            "failed": self.failed,
        }


def label_of(served: Served, outputs: list[np.ndarray]) -> str:
    """The label that outputs of a row stand for; `ALL` where a row has no label of its own."""
    if served.task.weighted and len(outputs) == 1 and outputs[0].shape == (len(served.labels),):
        return served.labels[int(outputs[0].argmax())]
    return ALL


def same_row(task: Task, found: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    """Whether what two versions gave for the features of a row says the same."""
    if len(found) != len(wanted) or any(one.shape != two.shape for one, two in zip(found, wanted, strict=False)):
        return False
    if task.generates:
        return all(np.array_equal(one, two) for one, two in zip(found, wanted, strict=True))
    return all(bool(task.same(one, two).all()) for one, two in zip(found, wanted, strict=True))
