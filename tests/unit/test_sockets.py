"""Clients that are slow, deaf or gone, over a socket: others are answered meanwhile, and nothing is kept of them."""

import asyncio
import gc
import json
import socket
import threading
import tracemalloc
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from endpoints import Plain, endpoint

PATIENCE_S = 120.0
HONEST = b'{"inputs": "a good day"}'
# What may be kept of the hostile requests below; one body of each of them would be 8 MB.
REQUESTS, BODY, GROWTH = 400, 20_000, 2**20


def run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, PATIENCE_S))


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """The application of `endpoint` behind a socket of this machine, as Serve has it, and its port."""
    from banjoray.serving.app import api

    config = uvicorn.Config(api, host="127.0.0.1", port=0, log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0)
    try:
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await serving


def head(length: int) -> bytes:
    return f"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: {length}\r\n\r\n".encode()


async def status_of(reader: asyncio.StreamReader) -> int:
    return int((await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1])


async def all_gone(server: uvicorn.Server) -> None:
    """Until nobody is connected and nothing runs for anybody."""
    while server.server_state.connections or server.server_state.tasks:
        await asyncio.sleep(0)


async def answered(port: int) -> int:
    """The status that somebody honest gets."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head(len(HONEST)) + HONEST)
    status = await status_of(reader)
    writer.close()
    await writer.wait_closed()
    return status


def test_a_body_that_comes_a_byte_at_a_time_is_ended_by_408_while_others_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replica = endpoint(monkeypatch, Plain(), timeout_s=0.5, access_log=False)

    async def scene() -> None:
        async with listening() as (server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            told = asyncio.create_task(status_of(reader))
            # More bytes than can come one by one in that time.
            writer.write(head(2**21))
            others = 0
            while not told.done():
                for _ in range(20):
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(0)
                assert await answered(port) == 200
                others += 1
            assert await told == 408
            assert others > 1
            writer.close()
            await all_gone(server)
        assert replica._queue._rows == 0

    run(scene())


def test_a_client_that_never_reads_holds_up_nobody_and_is_forgotten_when_it_hangs_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = 60_000
    engine = Plain()
    replica = endpoint(monkeypatch, engine, max_rows=rows, access_log=False, max_batch_tokens=10**6)
    body = json.dumps({"inputs": ["a"] * rows}).encode()

    async def scene() -> None:
        with socket.socket() as deaf:
            async with listening() as (server, port):
                # The answer is a few MB: far more than fits into what lies between them.
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                deaf.connect(("127.0.0.1", port))
                await asyncio.to_thread(deaf.sendall, head(len(body)) + body)
                while sum(engine.rows) < rows or replica._queue._rows:
                    await asyncio.sleep(0)
                for _ in range(5):
                    assert await answered(port) == 200
                state = server.server_state
                while len(state.connections) > 1 or state.tasks:
                    await asyncio.sleep(0)
                # Its answer lies with its connection, and nothing runs for it.
                assert len(state.connections) == 1
                deaf.close()
                await all_gone(server)

    run(scene())


def test_hostile_clients_leave_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = endpoint(monkeypatch, Plain(), access_log=False)
    text = b"a" * BODY

    async def hostile(port: int, number: int) -> None:
        """One that hangs up in its body, before its answer, or sends what is no HTTP, no JSON, or too much."""
        whole = b'{"inputs": "' + text + b'"}'
        sent = (
            head(len(whole)) + whole[: BODY // 2],
            head(len(whole)) + whole,
            text,
            head(BODY) + text,
            head(2**40) + text,
        )[number % 5]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        await writer.drain()
        if number % 5 > 2:
            assert await status_of(reader) == (400 if number % 5 == 3 else 413)
        writer.close()
        await writer.wait_closed()

    async def scene() -> None:
        async with listening() as (server, port):
            before = 0
            for passed in range(2):
                for start in range(0, REQUESTS, 20):
                    await asyncio.gather(*(hostile(port, number) for number in range(start, start + 20)))
                await all_gone(server)
                assert await answered(port) == 200
                await all_gone(server)
                gc.collect()
                if not passed:
                    tracemalloc.start()
                    before = tracemalloc.get_traced_memory()[0]
            grown = tracemalloc.get_traced_memory()[0] - before
            tracemalloc.stop()
            assert grown < GROWTH
        assert replica._queue._rows == 0

    run(scene())


def test_thousands_that_are_refused_leave_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Plain()
    replica = endpoint(monkeypatch, engine, latency_target_ms=1000, access_log=False)
    engine.hold = threading.Event()
    replica.pick()._batcher.pace._row_s = 1000.0

    async def scene() -> None:
        async with listening() as (server, port):
            first = asyncio.create_task(answered(port))
            while not replica._queue._rows:
                await asyncio.sleep(0)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            before = 0
            for number in range(3000):
                if number == 500:
                    tracemalloc.start()
                    before = tracemalloc.get_traced_memory()[0]
                writer.write(head(1000) + b" " * 1000)
                told = await reader.readuntil(b"\r\n\r\n")
                length = int(told.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                assert told.startswith(b"HTTP/1.1 429 ")
            grown = tracemalloc.get_traced_memory()[0] - before
            tracemalloc.stop()
            assert grown < GROWTH
            writer.close()
            engine.hold.set()
            assert await first == 200
            await all_gone(server)

    run(scene())
