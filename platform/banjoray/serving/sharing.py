"""Versions of one replica that are the same from the bottom up to some block: one copy of it, one pass for all of them.

Rows of all of them wait in one batcher. A batch runs what they share once over all of its rows, equal rows once, and
parts where they do: a model that was trained above block 4 leaves there, two others part below their heads. Who shares
what is seen from the weights when a batch is made, so a version can come or go while others answer; those who wait
keep theirs alive.

What ONNX computes, and models that write texts, go alone; equal weights of the latter are still held once.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

from banjoray.config.serve import ServeConfig
from banjoray.data.tokens import Feature
from banjoray.errors import ModelError
from banjoray.models.sections import Sections, held_once
from banjoray.serving.batching import Batcher
from banjoray.serving.costs import Cost
from banjoray.serving.engine import Engine
from banjoray.serving.limits import Entry, Queue

# The shape by which the costs of two models are compared: rows and the longest of them.
USUAL = (8, 32)


@dataclass(frozen=True, eq=False, kw_only=True)
class Owned(Feature):
    """A feature, and whose it is."""

    member: "Member"


class Member:
    """A version in a group, as large as one."""

    def __init__(self, engine: Engine, sections: Sections | None, cost: Cost, group: "Group") -> None:
        self.engine = engine
        self.sections = sections
        self.cost = cost
        self.group = group

    def owned(self, rows: Sequence[Sequence[Feature]]) -> list[list[Owned]]:
        """The features of some rows, as the group's batcher takes them."""
        return [
            [Owned(feature.inputs, feature.aside, feature.settings, member=self) for feature in row] for row in rows
        ]

    def shares(self) -> dict[str, int]:
        """The other versions that it shares passes with, and how many of the lowest blocks."""
        others = [other for other in self.group.members if other is not self]
        return {str(other.engine.version): _common([self, other]) for other in others}

    def top(self, level: "_Level") -> "Sequence[np.ndarray | Exception]":
        """What the task keeps of the outputs of a level's rows; of each what went wrong, if it did."""
        assert self.sections is not None
        assert level.states is not None
        try:
            outputs = self.sections.top(level.inputs, level.states, level.depth)
            return self.engine.task.kept(outputs, level.inputs, None)
        except Exception as error:  # noqa: BLE001  the boundary between versions: the rows of others go on
            return [error] * len(level.lengths)


class Group:
    """Versions whose rows share passes, and the batcher where they wait: one version, or several with equal bottoms."""

    def __init__(
        self, limits: ServeConfig, queue: Queue[Owned, np.ndarray], thread: ThreadPoolExecutor, cost: Cost
    ) -> None:
        self.members: WeakSet[Member] = WeakSet()
        self._cost = cost
        self.batcher: Batcher[Entry[Owned], np.ndarray] = Batcher(
            queue.timed(self.forward), limits.max_batch_tokens, self.cost, limits.pass_target_ms / 1000, thread
        )
        queue.paces.add(self.batcher.pace)

    def add(self, member: Member) -> None:
        """One more; a pass costs what it costs the slowest of them."""
        # A new set: whoever goes through the old one, in another thread, is not disturbed.
        self.members = WeakSet([*self.members, member])
        self._cost = max((each.cost for each in self.members), key=lambda cost: cost(*USUAL))

    def cost(self, rows: int, longest: int) -> float:
        """Seconds of a pass."""
        return self._cost(rows, longest)

    def forward(self, rows: Sequence[Owned]) -> Sequence[np.ndarray | Exception]:
        """What the task of each row keeps of its outputs, in their order; what went wrong, above what is shared."""
        asked: dict[Member, list[int]] = {}
        for number, row in enumerate(rows):
            asked.setdefault(row.member, []).append(number)
        if len(asked) == 1:
            return rows[0].member.engine.forward(rows)
        keys = [tuple(map(tuple, row.inputs.values())) for row in rows]
        unique = dict(zip(keys, rows, strict=True))
        place = {key: number for number, key in enumerate(unique)}
        level = _Level(rows[0].member.engine.inputs(list(unique.values())), list(map(len, unique.values())))
        places = {member: [place[keys[number]] for number in numbers] for member, numbers in asked.items()}
        found: dict[int, np.ndarray | Exception] = {}
        with torch.inference_mode():
            for member, outputs in _climbed(places, level):
                found |= zip(asked[member], outputs, strict=True)
        return [found[number] for number in range(len(rows))]


class Shares:
    """The groups of a replica; which of them a version joins, its weights decide."""

    def __init__(self, limits: ServeConfig, queue: Queue[Owned, np.ndarray], thread: ThreadPoolExecutor) -> None:
        self._limits, self._queue, self._thread = limits, queue, thread
        self._groups: WeakValueDictionary[str, Group] = WeakValueDictionary()
        self._weights: WeakValueDictionary[str, nn.Parameter] = WeakValueDictionary()
        self._joining = threading.Lock()

    def join(self, engine: Engine) -> Member:
        """A version that has got no requests yet, in the group of those that it has at least a block in common with.

        Measures the engine's passes, which takes a moment.
        """
        cost = engine.cost()
        with self._joining:
            sections = self._sections(engine)
            key = _key(engine, sections) if sections else ""
            group = self._groups.get(key) or Group(self._limits, self._queue, self._thread, cost)
            if sections:
                self._groups[key] = group
            member = Member(engine, sections, cost, group)
            group.add(member)
        return member

    def _sections(self, engine: Engine) -> Sections | None:
        """The engine's model as something to share; None where it can't be."""
        if not isinstance(engine.model, nn.Module):
            return None
        digests = held_once(engine.model, self._weights)
        if engine.task.generates:
            return None
        try:
            return Sections(engine.model, digests)
        except ModelError:
            return None


def _key(engine: Engine, sections: Sections) -> str:
    """What versions of one group have in common: a block, and which inputs there are and how they are padded."""
    tokenizer = engine.tokenizer
    return " ".join([sections.marks[0], *tokenizer.model_input_names, str(tokenizer.pad_token_id)])


@dataclass(frozen=True)
class _Level:
    """Rows on their way up: the model's inputs, how long each row is, and the states above ``depth`` blocks."""

    inputs: dict[str, Tensor]
    lengths: list[int]
    states: Tensor | None = None
    depth: int = 0

    def up(self, member: Member, depth: int) -> "_Level":
        """The same rows above more blocks, those of a member."""
        assert member.sections is not None
        if depth == self.depth:
            return self
        states = member.sections.up(self.inputs, self.states, self.depth, depth)
        return _Level(self.inputs, self.lengths, states, depth)

    def of(self, rows: list[int]) -> "_Level":
        """Some of the rows, in an order, as wide as the longest of them."""
        if rows == list(range(len(self.lengths))):
            return self
        lengths = [self.lengths[row] for row in rows]
        longest = max(lengths)
        inputs = {name: cells[rows, :longest] for name, cells in self.inputs.items()}
        return _Level(inputs, lengths, None if self.states is None else self.states[rows, :longest], self.depth)


def _climbed(
    asked: Mapping[Member, list[int]], level: _Level
) -> Iterator[tuple[Member, Sequence[np.ndarray | Exception]]]:
    """What each member keeps of its rows: together as far as all are the same, then apart, branch by branch."""
    members = list(asked)
    if len(members) == 1:
        yield members[0], members[0].top(level.of(asked[members[0]]))
        return
    depth = _common(members)
    level = level.up(members[0], depth)
    branches: dict[Any, list[Member]] = {}
    for member in members:
        assert member.sections is not None
        # Of two with the same blocks all the way, the heads part.
        above = member.sections.marks[depth:]
        branches.setdefault(above[0] if above else member, []).append(member)
    for branch in branches.values():
        rows = sorted({row for member in branch for row in asked[member]})
        place = {row: number for number, row in enumerate(rows)}
        yield from _climbed({member: [place[row] for row in asked[member]] for member in branch}, level.of(rows))


def _common(members: Sequence[Member]) -> int:
    """How many of the lowest blocks some members have in common."""
    marks = [member.sections.marks for member in members if member.sections is not None]
    return sum(len(set(block)) == 1 for block in zip(*marks, strict=False))
