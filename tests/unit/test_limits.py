"""What a replica takes on: rows, tokens, time; and that what is given up costs no pass."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import httpx
import pytest

from banjoray.config.section import validate
from banjoray.config.serve import ServeConfig
from banjoray.errors import MOST_TOLD, RequestError
from banjoray.serving.limits import LONGEST_RETRY_S, Queue
from endpoints import Plain, client, endpoint

PATIENCE_S = 60.0


def run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, PATIENCE_S))


class Silent:
    """A telemetry that nobody reads."""

    log_texts = False

    def batch(self, lengths: Any, seconds: float) -> None:
        self.last = (lengths, seconds)

    def queued(self, rows: int) -> None:
        self.rows = rows


async def until_waiting(replica: Any, rows: int) -> None:
    """Until the replica holds so many rows."""
    while replica._queue._rows != rows:
        await asyncio.sleep(0)


def ask(http: httpx.AsyncClient, count: int, text: str = "a") -> "asyncio.Task[httpx.Response]":
    return asyncio.create_task(http.post("/", json={"inputs": [text] * count}))


def test_a_row_too_many_gets_429_with_the_seconds_to_wait_and_the_others_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Plain()
    engine.hold = threading.Event()
    replica = endpoint(monkeypatch, engine, max_queued_rows=4)

    async def scene() -> None:
        async with client() as http:
            taken = [ask(http, 1), ask(http, 3)]
            await until_waiting(replica, 4)
            refused = await ask(http, 1)
            assert refused.status_code == 429
            assert refused.json() == {"error": "4 rows wait here, 4 may; try again in 1 s"}
            assert refused.headers["retry-after"] == "1"
            engine.hold.set()
            assert [(await task).status_code for task in taken] == [200, 200]
            assert (await ask(http, 1)).status_code == 200
        assert sum(engine.rows) == 5

    run(scene())


def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint(monkeypatch, Plain(), max_queued_rows=2)

    async def scene() -> None:
        async with client() as http:
            assert (await ask(http, 7)).status_code == 200

    run(scene())


@pytest.mark.parametrize(("row_s", "rows", "told"), [(0.0, 10, "1"), (0.5, 10, "5"), (0.55, 10, "6"), (9.0, 99, "60")])
def test_the_seconds_to_wait_are_what_the_rows_will_take(row_s: float, rows: int, told: str) -> None:
    config = validate(ServeConfig, {"model": "tiny@1", "max_queued_rows": 1}, "args")
    silent: Any = Silent()
    queue: Queue[str, str] = Queue(config, silent)
    queue._row_s = row_s
    with queue._counted(rows), pytest.raises(RequestError) as refused:
        queue._check_room(1)
    assert refused.value.headers == {"retry-after": told}
    assert int(told) <= LONGEST_RETRY_S
    queue._check_room(1)


def test_a_batch_teaches_how_long_a_row_takes() -> None:
    config = validate(ServeConfig, {"model": "tiny@1"}, "args")
    silent: Any = Silent()
    queue: Queue[str, str] = Queue(config, silent)
    from banjoray.serving.limits import Entry

    entries = [Entry("abc"), Entry("a")]
    assert queue.timed(lambda rows: [row.upper() for row in rows])(entries) == ["ABC", "A"]
    assert queue._row_s > 0
    assert silent.last[0] == [3, 1]
    assert all(entry.began is not None and entry.ended is not None for entry in entries)


def test_too_many_tokens_get_413_after_they_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Plain()
    endpoint(monkeypatch, engine, max_tokens_per_request=6)

    async def scene() -> None:
        async with client() as http:
            assert (await ask(http, 2, "a b c")).status_code == 200
            refused = await ask(http, 1, "a b c d e f g")
            assert refused.status_code == 413
            assert refused.json() == {"error": "inputs: 7 tokens; this endpoint takes 6 in one request"}
        assert engine.rows == [2]

    run(scene())


def test_a_request_out_of_time_gets_504_and_its_rows_cost_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Plain()
    engine.hold = threading.Event()
    replica = endpoint(monkeypatch, engine, timeout_s=0.2)

    async def scene() -> None:
        async with client() as http:
            passing = ask(http, 1)
            await until_waiting(replica, 1)
            waiting = [ask(http, 3), ask(http, 3)]
            late = [await task for task in (passing, *waiting)]
            assert [response.status_code for response in late] == [504] * 3
            assert late[0].json() == {"error": "no answer within 0.2 s"}
            assert replica._queue._rows == 0
            engine.hold.set()
            assert (await ask(http, 2)).status_code == 200
        # The pass that had begun, and the last request's; none for the six rows that were given up.
        assert engine.rows == [1, 2]

    run(scene())


def test_rows_of_a_client_that_went_away_cost_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Plain()
    engine.hold = threading.Event()
    replica = endpoint(monkeypatch, engine)

    async def scene() -> None:
        async with client() as http:
            passing = ask(http, 1)
            await until_waiting(replica, 1)
            # Serve cancels the request of a client that is gone.
            gone = ask(http, 3)
            await until_waiting(replica, 4)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            assert replica._queue._rows == 1
            engine.hold.set()
            assert (await passing).status_code == 200
            assert (await ask(http, 2)).status_code == 200
        assert engine.rows == [1, 2]

    run(scene())


@pytest.mark.parametrize("parts", [[], [b'{"inputs": ']])
def test_a_body_that_stops_half_way_gets_408(monkeypatch: pytest.MonkeyPatch, parts: list[bytes]) -> None:
    endpoint(monkeypatch, Plain(), timeout_s=0.2)
    from banjoray.serving.app import api

    sent: list[Any] = []
    left = [{"type": "http.request", "body": part, "more_body": True} for part in parts]

    async def receive() -> Any:
        return left.pop(0) if left else await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "raw_path": b"/", "query_string": b"", "headers": []}
    run(api(scope, receive, send))
    assert sent[0]["status"] == 408
    assert sent[1]["body"] == b'{"error":"the body did not come within 0.2 s"}'


def test_what_an_error_sends_back_is_short_and_can_be_sent() -> None:
    long = RequestError("x" * 10 * MOST_TOLD)
    assert len(long.message) < MOST_TOLD + 10
    assert RequestError("key '\ud800'").message.encode("utf-8") == b"key '\\ud800'"
