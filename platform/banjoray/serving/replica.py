"""What a replica answers with: a version or more of every model that it serves. Knows nothing of Ray or HTTP."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from banjoray.config.serve import ServeConfig
from banjoray.errors import RequestError
from banjoray.serving.engine import Engine
from banjoray.serving.limits import Queue
from banjoray.serving.security import NONE, Keys
from banjoray.serving.served import Served
from banjoray.serving.shadow import Shadow
from banjoray.serving.sharing import Owned, Shares
from banjoray.serving.telemetry import Telemetry, current


@dataclass(frozen=True)
class Slot:
    """The versions of one model that a replica holds, and who answers: the candidate a share of requests, 0 to 1."""

    production: Served
    previous: Served | None = None
    candidate: Served | None = None
    share: float = 0.0
    shadow: Shadow | None = None
    refused: str = ""
    """Which versions were refused since the last change, and why."""

    def roles(self) -> Iterator[tuple[str, Served]]:
        """Every version that is held, and as what."""
        shadow = self.shadow.served if self.shadow else None
        held = {"production": self.production, "previous": self.previous, "candidate": self.candidate, "shadow": shadow}
        return ((role, served) for role, served in held.items() if served is not None)

    @property
    def held(self) -> dict[str, Any]:
        """Role -> name@number, and the traffic of each where there is a candidate; as `Rollout.held`."""
        traffic = {"production": 1 - self.share, "candidate": self.share}
        found: dict[str, Any] = {role: str(served.version) for role, served in self.roles()}
        return found | ({"traffic": traffic} if self.candidate is not None else {})

    def answering(self, request: str) -> Served:
        """Who answers the request of this id; the same id is always answered by the same version."""
        if self.candidate is None or _share_of(request) >= self.share:
            return self.production
        return self.candidate


class Replica:
    """The models by their names, and what all of them share: keys, limits, telemetry, the thread of forward passes."""

    def __init__(self, limits: ServeConfig, name: str = "") -> None:
        self.limits = limits
        self.keys = None if limits.api_keys in (None, NONE) else Keys(limits.api_keys)
        self.slots: dict[str, Slot] = {}
        self.telemetry = Telemetry(limits, name, self._versions)
        self._queue: Queue[Owned, np.ndarray] = Queue(limits, self.telemetry)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="banjoray-forward")
        self._shares = Shares(limits, self._queue, self._thread)

    def serve(self, engine: Engine) -> Served:
        """What answers with an engine; it gets no requests before it stands in a slot.

        It shares passes with those that are served already, or were and still answer, where its weights are theirs.
        """
        return Served(engine, self.limits, self._queue, self._shares)

    def check_wait(self) -> None:
        """Raise RequestError, 429, where whoever asks now would wait too long."""
        self._queue.check_wait()

    def pick(self, name: object = None) -> Served:
        """Who answers the request that is answered here, for a model's name or name@version; the only model, for None.

        Raises RequestError: 404 for another model or version, 422 for no name where there are several.
        """
        found = self._found(name)
        current().version = str(found.version)
        return found

    def _found(self, name: object) -> Served:
        request = current().id
        if name is None and len(self.slots) == 1:
            (slot,) = self.slots.values()
            return slot.answering(request)
        model, at, number = name.partition("@") if isinstance(name, str) else ("", "", "")
        asked = self.slots.get(model)
        if asked is not None and not at:
            return asked.answering(request)
        if asked is not None:
            # Not one that is only kept, or compared: nobody is meant to depend on those.
            for each in (asked.production, asked.candidate):
                if each is not None and str(each.version.version) == number:
                    return each
        served = " and ".join(f"'{name}' ('{slot.production.version}')" for name, slot in sorted(self.slots.items()))
        if name is None:
            raise RequestError(f"model: missing; this endpoint serves {served}")
        raise RequestError(f"model: found {name!r:.100}; this endpoint serves {served}", 404)

    def _versions(self) -> Iterator[dict[str, str]]:
        for name, slot in self.slots.items():
            for role, served in slot.roles():
                run = str(served.version.lineage["run"])
                yield {"model": name, "version": str(served.version), "run": run, "role": role}


def _share_of(request: str) -> float:
    """A number from 0 to 1, evenly spread over ids."""
    return int.from_bytes(hashlib.sha256(request.encode()).digest()[:7], "big") / 2**56
