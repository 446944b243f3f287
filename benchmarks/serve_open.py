"""An open loop of requests to one address, run as a process of its own: they come at random moments, whoever waits.

    python -m benchmarks.serve_open '{"port": 8123, "texts": "texts.json", "rate": 500, "seconds": 30, "tries": 1}'

Moments are those of a Poisson process; a request's time counts from the moment at which it was due, so that a late
client makes no answer look fast. At most `CONNECTIONS` requests are on their way; what was due beyond that is counted
as unsent, and a load with any says nothing about the server.

``tries`` above 1: a request whose connection broke, or that got 502, 503 or HAProxy's own 500 (which Serve puts in the
place of both), is sent again so often, and one that got 429 after once or twice the time that Retry-After says.
``labels`` is a file with the checkpoint's own labels of all texts by version: answers are compared with those of the
version that they name. Prints a JSON line.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.serve_load import Connection, Reply, label_of

CONNECTIONS = 2000
PATIENCE_S = 60.0
PAUSE_S = 0.2
AGAIN = {"broken", "500 of haproxy", "502", "503"}


def main() -> None:
    """One load, told."""
    case = json.loads(sys.argv[1])
    print(json.dumps(asyncio.run(Open(case).run())))


class Open:
    """A load and what came of it."""

    def __init__(self, case: dict[str, Any]) -> None:
        self._case = case
        texts = json.loads(Path(case["texts"]).read_text(encoding="utf-8"))
        self._bodies = [json.dumps({"inputs": text}).encode() for text in texts]
        self._labels = json.loads(Path(case["labels"]).read_text(encoding="utf-8")) if "labels" in case else {}
        self._idle: list[Connection] = []
        self._asked: set[asyncio.Task[None]] = set()
        self._statuses: Counter[str] = Counter()
        self._versions: Counter[str] = Counter()
        self._answered: list[float] = []
        self._refused: list[float] = []
        self._told: Counter[str] = Counter(sent=0, unsent=0, answered=0, lost=0, wrong=0, retried=0)
        self._late_s = 0.0

    async def run(self) -> dict[str, Any]:
        """Send for as long as the case says, and wait for the last answer."""
        moments = random.Random(self._case.get("seed", 0))
        due = began = time.perf_counter()
        while (due := due + moments.expovariate(self._case["rate"])) < began + self._case["seconds"]:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            self._late_s = max(self._late_s, time.perf_counter() - due)
            if len(self._asked) >= CONNECTIONS:
                self._told["unsent"] += 1
                continue
            self._told["sent"] += 1
            task = asyncio.create_task(self._ask(moments.randrange(len(self._bodies)), due))
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)
        await asyncio.gather(*self._asked)
        return self._summary()

    async def _ask(self, number: int, due: float) -> None:
        """One request, as often as it may be tried."""
        left = self._case.get("tries", 1)
        while True:
            sent = time.perf_counter()
            kind, reply = await self._sent(self._bodies[number])
            self._statuses[kind] += 1
            if kind == "429":
                self._refused.append(time.perf_counter() - sent)
            if kind == "200" and reply is not None:
                self._note(number, reply, due)
                return
            left -= kind != "429"
            again = self._case.get("tries", 1) > 1 and (kind in AGAIN or kind == "429") and left > 0
            if not again or time.perf_counter() - due > PATIENCE_S:
                self._told["lost"] += 1
                return
            self._told["retried"] += 1
            pause_s = float(reply.fields.get("retry-after", 1)) if reply and kind == "429" else PAUSE_S
            # Not all at the same moment.
            await asyncio.sleep(pause_s * random.uniform(1, 2))

    async def _sent(self, body: bytes) -> tuple[str, Reply | None]:
        """What came of sending a body once: a status, or a word; and the answer if there was one."""
        connection = self._idle.pop() if self._idle else Connection(self._case["port"])
        try:
            async with asyncio.timeout(PATIENCE_S):
                if not connection.is_open:
                    await connection.open()
                reply = await connection.post(body)
        except TimeoutError:
            connection.close()
            return "none in time", None
        except (OSError, EOFError, ValueError):
            connection.close()
            return "broken", None
        if reply.fields.get("connection") == "close":
            connection.close()
        else:
            self._idle.append(connection)
        # What a replica says is timed.
        by_haproxy = reply.status == 500 and "server-timing" not in reply.fields
        return f"{reply.status} of haproxy" if by_haproxy else str(reply.status), reply

    def _note(self, number: int, reply: Reply, due: float) -> None:
        self._answered.append(time.perf_counter() - due)
        self._told["answered"] += 1
        version = reply.fields["x-model-version"]
        self._versions[version] += 1
        wanted = self._labels.get(version)
        if self._labels and (wanted is None or label_of(json.loads(reply.body)) != wanted[number]):
            self._told["wrong"] += 1

    def _summary(self) -> dict[str, Any]:
        quantiles = {
            f"{name}_{quantile}_ms": at(times, share)
            for name, times in (("answered", self._answered), ("refused", self._refused))
            for quantile, share in (("p50", 0.5), ("p99", 0.99))
        }
        return {
            **self._told,
            **quantiles,
            "statuses": dict(sorted(self._statuses.items())),
            "versions": dict(sorted(self._versions.items())),
            "client_late_ms": round(1000 * self._late_s, 1),
        }


def at(times: list[float], share: float) -> float | None:
    """The quantile of some times, in milliseconds."""
    return round(1000 * sorted(times)[int(share * (len(times) - 1))], 2) if times else None


if __name__ == "__main__":
    main()
