"""Brings a replica to the versions that a rollout names: loads them beside what answers, compares, swaps. No Ray.

What answers is never taken away: a version that can't be loaded, or is worse or slower than what answers, is refused,
with the reason in `Slot.refused` and in the log, and everything stays as it was.
"""

import asyncio
import gc
from collections.abc import Callable, Mapping
from dataclasses import replace

from banjoray.config.rollout import Gate, Rollout
from banjoray.serving.candidates import Verdict, unlike
from banjoray.serving.engine import Engine
from banjoray.serving.replica import Replica, Slot
from banjoray.serving.served import Served, silent
from banjoray.serving.shadow import Shadow

ANSWERING = ("production", "candidate")
Load = Callable[[str], Engine]
"""Loads name@number."""
Compare = Callable[[Engine, Engine, Gate], Verdict]
"""The verdict on a loaded version beside the one that answers."""


class Rollouts:
    """The versions that a replica holds, by what its rollouts ask for.

    ``load`` and ``compare`` run in a thread of their own while others are answered.
    """

    def __init__(self, replica: Replica, load: Load, compare: Compare) -> None:
        self._replica = replica
        self._load = load
        self._compare = compare
        self._held: dict[str, Served] = {}
        self._verdicts: dict[tuple[str, str, Gate], Verdict] = {}
        self._lock = asyncio.Lock()
        self._following: set[asyncio.Task[None]] = set()

    async def follow(self, plans: Mapping[str, Rollout]) -> None:
        """Do what rollouts say: at once where everything was prepared, else beside the requests that go on.

        Raises what ``load`` raises where nothing answers yet.
        """
        for name, plan in plans.items():
            if name not in self._replica.slots:
                await self._start(name, plan)
            elif self._prepared(name, plan):
                await self._apply(name, plan)
            else:
                self._later(name, plan)

    async def prepare(self, plans: Mapping[str, Rollout]) -> list[Verdict]:
        """Load and compare what rollouts name, and change nothing: the verdict on every version that is new here."""
        async with self._lock:
            found = []
            for name, plan in plans.items():
                found += await self._ready(name, plan)
            return found

    async def forget(self) -> None:
        """Drop what was prepared and is not used."""
        async with self._lock:
            self._drop()

    def _drop(self) -> None:
        used = {str(each.version): each for slot in self._replica.slots.values() for _, each in slot.roles()}
        dropped = self._held.keys() - used.keys()
        self._held = used
        self._verdicts.clear()
        if dropped:
            # Models hold circles of references, and memory is what they are made of.
            gc.collect()

    async def _start(self, name: str, plan: Rollout) -> None:
        """The first version, which is compared with none; the others when it answers."""
        first = plan.production
        if first not in plan.accepted and plan.previous is not None:
            first = plan.previous
        served = await self._loaded(first)
        self._replica.slots[name] = Slot(served)
        if plan.references.keys() - {"production"}:
            if first == plan.production:
                self._later(name, plan)
            else:
                await self._apply(name, plan)

    def _later(self, name: str, plan: Rollout) -> None:
        task = asyncio.get_running_loop().create_task(self._apply(name, plan))
        self._following.add(task)
        task.add_done_callback(self._following.discard)

    def _prepared(self, name: str, plan: Rollout) -> bool:
        """Whether nothing has to be loaded or compared any more; a refusal is known as well."""
        against = str(self._replica.slots[name].production.version)
        return not self._lock.locked() and all(
            reference in self._held
            and (not self._due(name, plan, role) or (reference, against, plan.gate) in self._verdicts)
            for role, reference in plan.references.items()
        )

    def _due(self, name: str, plan: Rollout, role: str) -> bool:
        """Whether the version of a role has to pass a comparison: one that shall answer, and has not so far."""
        roles = self._replica.slots[name].roles()
        answering = {str(each.version) for held_as, each in roles if held_as in ANSWERING}
        return role in ANSWERING and plan.references[role] not in answering.union(plan.accepted)

    async def _apply(self, name: str, plan: Rollout) -> None:
        async with self._lock:
            refused = [verdict for verdict in await self._ready(name, plan) if verdict.why]
            slot = self._replica.slots[name]
            if refused:
                told = "; ".join(f"{verdict.version} is refused: {verdict.why}" for verdict in refused)
                self._replica.telemetry.told(f"rollout of {name}", told)
                self._replica.slots[name] = replace(slot, refused=told)
            else:
                self._replica.slots[name] = self._slot(plan, slot)
            self._drop()

    async def _ready(self, name: str, plan: Rollout) -> list[Verdict]:
        """Everything that a plan names, loaded, and compared where it shall answer and was not before."""
        found = []
        for role, reference in plan.references.items():
            live = self._replica.slots[name].production
            against = str(live.version)
            try:
                served = await self._loaded(reference)
            except Exception as error:  # noqa: BLE001  the boundary to what answers, which no candidate may end
                found.append(Verdict(reference, against, f"it can't be loaded ({type(error).__name__}: {error})"))
                continue
            if role == "shadow" and (why := unlike(served.engine, live.engine)):
                found.append(Verdict(reference, against, why))
            if self._due(name, plan, role):
                pair = (reference, against, plan.gate)
                if pair not in self._verdicts:
                    self._verdicts[pair] = await self._verdict(served, live, plan.gate)
                found.append(self._verdicts[pair])
        return found

    async def _verdict(self, served: Served, live: Served, gate: Gate) -> Verdict:
        try:
            return await asyncio.to_thread(self._compare, served.engine, live.engine, gate)
        except Exception as error:  # noqa: BLE001  the boundary to what answers, which no candidate may end
            # What the error says may hold texts of the rows.
            self._replica.telemetry.broken(f"probe rows, {served.version}", error)
            why = f"it can't answer the probe rows ({type(error).__name__}; the replica's log says where)"
            return Verdict(str(served.version), str(live.version), why)

    async def _loaded(self, reference: str) -> Served:
        if reference not in self._held:
            self._held[reference] = await asyncio.to_thread(lambda: self._replica.serve(self._load(reference)))
        return self._held[reference]

    def _slot(self, plan: Rollout, before: Slot) -> Slot:
        """The slot of a plan, everything of which is loaded; a shadow of the same pair goes on counting."""
        held = {role: self._held[reference] for role, reference in plan.references.items()}
        shadow = None
        if "shadow" in held:
            kept = before.shadow if before.production is held["production"] else None
            same = kept is not None and kept.served is held["shadow"]
            shadow = kept if same else Shadow(held["shadow"], self._replica.telemetry)
        before.production.told = silent
        held["production"].told = shadow.compare if shadow else silent
        return Slot(held["production"], held.get("previous"), held.get("candidate"), plan.share, shadow)
