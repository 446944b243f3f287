"""Hostile requests to every task: each is answered, none with a 500, and the next honest one as ever."""

import asyncio
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from endpoints import client, endpoint, untrained
from hostile import FILES, TINY, bodies, explore, usual

PATIENCE_S = 240.0
# What may be kept of a few thousand requests: series of metrics, caches of a tokenizer.
GROWTH = 8 * 2**20


@pytest.fixture(scope="module", params=FILES)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(task: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return untrained(TINY / FILES[task], tmp_path_factory.mktemp(task))


@pytest.fixture
def replica(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    return endpoint(monkeypatch, engine, access_log=False)


def test_no_hostile_body_breaks_or_holds_up_an_endpoint(engine: Any, task: str, replica: Any) -> None:
    async def scene() -> None:
        async with client() as http:
            honest = await http.post("/", json=usual(task))
            assert honest.status_code == 200, honest.text
            for body in bodies(engine, task):
                response = await http.post("/", content=body)
                assert response.status_code < 500, (body[:300], response.text)
                if response.status_code >= 400:
                    assert list(response.json()) == ["error"], body[:300]
                    assert len(response.content) < 10_000, body[:300]
            assert (replica._queue._rows, replica.pick()._batcher._waiting) == (0, [])
            assert (await http.post("/", json=usual(task))).json() == honest.json()

    asyncio.run(asyncio.wait_for(scene(), PATIENCE_S))


@pytest.fixture
def classifier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return endpoint(monkeypatch, untrained(TINY / FILES["text-classification"], tmp_path), access_log=False)


@pytest.mark.usefixtures("classifier")
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "a/b;c=\xff", ""])
def test_what_a_body_is_called_does_not_matter(kind: str) -> None:
    async def scene() -> None:
        async with client() as http:
            headers = {b"content-type": kind.encode("latin-1")}
            response = await http.post("/", content=b'{"inputs": "a good day"}', headers=headers)
            assert response.status_code == 200, response.text

    asyncio.run(scene())


@pytest.mark.usefixtures("classifier")
@pytest.mark.parametrize("length", [b"-1", b"abc", b"0", b"5", b"99999999999999999999", b"\xb2", b""])
def test_a_length_that_is_not_the_bodys_breaks_nothing(length: bytes) -> None:
    async def scene() -> None:
        async with client() as http:
            headers = {b"content-length": length}
            response = await http.post("/", content=b'{"inputs": "a good day"}', headers=headers)
            assert response.status_code in (200, 413), response.text

    asyncio.run(scene())


def test_refused_bodies_leave_no_memory_behind(classifier: Any) -> None:
    body = b'{"inputs": ["' + b"a" * 400_000 + b'", 1]}'

    async def scene() -> int:
        async with client() as http:
            for _ in range(3):
                await http.post("/", content=body)
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            for number in range(50):
                response = await http.post("/", content=body, headers={"x-request-id": str(number)})
                assert response.status_code == 422
            grown = tracemalloc.get_traced_memory()[0] - before
            tracemalloc.stop()
            return grown

    # Each of the fifty would be 400 KB.
    assert asyncio.run(scene()) < GROWTH
    assert classifier._queue._rows == 0


@pytest.mark.usefixtures("classifier")
def test_nothing_that_schemathesis_makes_of_the_openapi_document_breaks_it() -> None:
    statuses = explore(300)
    assert sum(statuses.values()) >= 300
    assert statuses[200]
    assert sum(count for status, count in statuses.items() if 400 <= status < 500)
