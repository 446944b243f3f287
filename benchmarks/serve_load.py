"""A closed loop of requests to one address, run as a process of its own: as many at once as there are connections.

    python -m benchmarks.serve_load '{"port": 8123, "texts": "texts.json", "connections": 32, "seconds": 5}'

With ``"long": true`` every twentieth request has a text of 400 words, and latencies are those of the others. Sockets
are kept open and read by an event loop without any HTTP library, so that the client takes little of the machine. Prints
a JSON line: requests per second, latencies in milliseconds, and the label of every text.
"""

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0
LONG_WORDS, LONG_EVERY = 400, 20


def main() -> None:
    """One load, told."""
    case = json.loads(sys.argv[1])
    texts = json.loads(Path(case["texts"]).read_text(encoding="utf-8"))
    bodies = [json.dumps({"inputs": text}).encode() for text in texts]
    long = json.dumps({"inputs": " ".join(" ".join(texts).split()[:LONG_WORDS])}).encode() if case["long"] else None
    print(json.dumps(asyncio.run(load(case["port"], bodies, long, (case["connections"], case["seconds"])))))


@dataclass(frozen=True)
class Reply:
    """An answer; names of ``fields`` (headers) and their values are in small letters."""

    status: int
    fields: dict[str, str]
    body: bytes


class Connection:
    """A socket that is kept open between requests."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.is_open = False

    async def open(self) -> "Connection":
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self.is_open = True
        return self

    async def post(self, body: bytes) -> Reply:
        """The answer to a POST; asked once more where the server had hung up between two requests."""
        try:
            return await self.posted(body)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            await self.open()
            return await self.posted(body)

    async def posted(self, body: bytes) -> Reply:
        """The answer to a POST."""
        head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        found = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        fields = dict(line.split(": ", 1) for line in found.split("\r\n")[1:] if ": " in line)
        status = int(found.split(" ", 2)[1])
        if "content-length" in fields:
            return Reply(status, fields, await self._reader.readexactly(int(fields["content-length"])))
        parts = []
        while size := int(await self._reader.readline(), 16):
            parts.append(await self._reader.readexactly(size))
            await self._reader.readline()
        await self._reader.readline()
        return Reply(status, fields, b"".join(parts))

    def close(self) -> None:
        """Hang up."""
        if self.is_open:
            self._writer.close()


async def load(port: int, bodies: list[bytes], long: bytes | None, shape: tuple[int, float]) -> dict[str, Any]:
    """What a load of so many connections and seconds gave; in 0 seconds every body is sent once, and its label told."""
    connections, seconds = shape
    labels: dict[int, str] = {}
    latencies: list[float] = []
    answered = 0
    turn = iter(range(len(bodies)) if not seconds else range(10**9))
    began = time.perf_counter()

    async def ask() -> None:
        nonlocal answered
        connection = await Connection(port).open()
        for number in turn:
            start = time.perf_counter()
            if seconds and start - began > seconds:
                break
            sent = long if long and number % LONG_EVERY == 0 else bodies[number % len(bodies)]
            reply = await asyncio.wait_for(connection.post(sent), PATIENCE_S)
            answered += 1
            if sent is not long:
                latencies.append(time.perf_counter() - start)
            if reply.status != 200:
                raise SystemExit(f"status {reply.status}: {reply.body[:300]!r}")
            if not seconds:
                labels[number] = label_of(json.loads(reply.body))
        connection.close()

    await asyncio.gather(*(ask() for _ in range(connections)))
    took = time.perf_counter() - began
    ordered = sorted(latencies)
    return {
        "requests_per_s": round(answered / took, 2),
        "p50_ms": round(1000 * ordered[len(ordered) // 2], 3),
        "p99_ms": round(1000 * ordered[int(0.99 * (len(ordered) - 1))], 3),
        "labels": [labels[number] for number in sorted(labels)],
    }


def label_of(body: Any) -> str:
    """The best label of an answer, in whichever lists it stands."""
    while isinstance(body, list):
        body = body[0]
    return str(body["label"])


if __name__ == "__main__":
    main()
