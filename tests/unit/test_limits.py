"""What a replica takes on: time to wait, tokens, time; and that what is given up costs no pass."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Coroutine
from typing import Any
from weakref import WeakSet

import httpx
import pytest

from banjoray.config.section import validate
from banjoray.config.serve import ServeConfig
from banjoray.errors import MOST_TOLD, RequestError
from banjoray.serving.costs import Cost
from banjoray.serving.limits import LONGEST_RETRY_S, Entry, Queue
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


def costly(engine: Plain, monkeypatch: pytest.MonkeyPatch) -> Plain:
    """The engine, whose passes cost 10 ms and 40 ms per token, and wait for `hold`."""
    monkeypatch.setattr(engine, "cost", lambda: Cost(fixed=0.01, per_cell=0.04))
    engine.hold = threading.Event()
    return engine


def test_a_request_that_would_wait_too_long_gets_429_with_the_seconds_to_wait_and_the_others_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = costly(Plain(), monkeypatch)
    replica = endpoint(monkeypatch, engine, latency_target_ms=1000)

    async def scene() -> None:
        async with client() as http:
            # Alone it takes two seconds, and whoever finds nobody before it is taken.
            large = ask(http, 50)
            await until_waiting(replica, 50)
            refused = await ask(http, 1)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "3"
            told = re.fullmatch(
                r"what waits here will take (2\.\d) s, 1 s may; try again in 3 s", refused.json()["error"]
            )
            assert told
            assert float(told[1]) == pytest.approx(50 * 0.05, rel=0.1)
            engine.hold.set()
            assert (await large).status_code == 200
            assert (await ask(http, 1)).status_code == 200
        assert sum(engine.rows) == 51

    run(scene())


@pytest.mark.parametrize(
    ("path", "shape"),
    [("/", ["error"]), ("/v2/models/tiny/infer", ["error"]), ("/embed", ["error", "error_type"])],
)
def test_what_is_refused_is_not_read_and_told_in_its_protocols_shape_while_others_see_that_all_is_well(
    monkeypatch: pytest.MonkeyPatch, path: str, shape: list[str]
) -> None:
    engine = costly(Plain(), monkeypatch)
    replica = endpoint(monkeypatch, engine, latency_target_ms=1000)

    read: list[str] = []

    async def body() -> AsyncIterator[bytes]:
        read.append(path)
        yield b"{}"

    async def scene() -> None:
        async with client() as http:
            large = ask(http, 50)
            await until_waiting(replica, 50)
            refused = await http.post(path, content=body())
            assert (refused.status_code, list(refused.json())) == (429, shape)
            refused = await http.post("/v1/embeddings", content=body())
            assert (refused.status_code, next(iter(refused.json()["error"]))) == (429, "message")
            assert read == []
            for seen in ("/healthz", "/metrics", "/v2/health/ready"):
                assert (await http.get(seen)).status_code == 200
            engine.hold.set()
            assert (await large).status_code == 200

    run(scene())


def test_what_was_taken_together_is_within_the_target_but_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = costly(Plain(), monkeypatch)
    replica = endpoint(monkeypatch, engine, latency_target_ms=1000)

    async def scene() -> None:
        async with client() as http:
            asked = [ask(http, 3) for _ in range(40)]
            # Those that are refused are told before a pass has ended.
            while sum(task.done() for task in asked) + replica._queue._rows // 3 < len(asked):
                await asyncio.sleep(0)
            engine.hold.set()
            statuses = [(await response).status_code for response in asked]
        taken = 3 * statuses.count(200)
        assert set(statuses) == {200, 429}
        assert sum(engine.rows) == taken
        # A second's worth of rows, and the request that found less than that before it.
        assert 1.0 <= taken * 0.05 <= 1.0 + 3 * 0.05 + 0.2

    run(scene())


@pytest.mark.parametrize(("target", "status"), [({}, 200), ({"latency_target_ms": 1000}, 429), ({"timeout_s": 1}, 429)])
def test_where_passes_have_no_cost_rows_take_what_rows_took_and_the_time_for_a_request_is_the_target(
    monkeypatch: pytest.MonkeyPatch, target: dict[str, Any], status: int
) -> None:
    engine = Plain()
    replica = endpoint(monkeypatch, engine, **target)
    replica.pick()._batcher.pace._row_s = 5.0
    engine.hold = threading.Event()

    async def scene() -> None:
        async with client() as http:
            first = ask(http, 1)
            await until_waiting(replica, 1)
            second = ask(http, 1)
            while not second.done() and replica._queue._rows == 1:
                await asyncio.sleep(0)
            engine.hold.set()
            assert [(await first).status_code, (await second).status_code] == [200, status]

    run(scene())


class Waits:
    """What waits in a batcher."""

    measured = True

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def wait_s(self) -> float:
        return self.seconds


@pytest.mark.parametrize(("wait_s", "told"), [(1.01, "2"), (5.0, "5"), (5.5, "6"), (900.0, "60")])
def test_the_seconds_to_wait_are_what_waits_will_take(wait_s: float, told: str) -> None:
    config = validate(ServeConfig, {"model": "tiny@1"}, "args")
    silent: Any = Silent()
    queue: Queue[str, str] = Queue(config, silent)
    pace: Any = Waits(wait_s / 2)
    others: Any = Waits(wait_s / 2)
    queue.paces = WeakSet([pace, others])
    with pytest.raises(RequestError) as refused:
        queue.check_wait()
    assert refused.value.headers == {"retry-after": told}
    assert int(told) <= LONGEST_RETRY_S
    pace.seconds, others.seconds = 1.0, 0.0
    queue.check_wait()


def test_a_batch_is_told_with_its_lengths_and_its_rows_know_when_it_was() -> None:
    config = validate(ServeConfig, {"model": "tiny@1"}, "args")
    silent: Any = Silent()
    queue: Queue[str, str] = Queue(config, silent)
    entries = [Entry("abc"), Entry("a")]
    assert queue.timed(lambda rows: [row.upper() for row in rows])(entries) == ["ABC", "A"]
    assert silent.last[0] == [3, 1]
    assert silent.last[1] > 0
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
