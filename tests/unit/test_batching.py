"""Rows of many requests share forward passes: in order, within the budget, oldest first, and each gets its own answer.

Rows are words here and the answer of a row is the word in capitals. A `Model` makes a pass only when it is let to, so
that a test decides what arrives during one; nothing waits for time to pass.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import TypeVar

import numpy as np
import pytest

from banjoray.serving.batching import Batcher

PATIENCE_S = 60.0
Found = TypeVar("Found")


class Model:
    """A forward that records its batches; passes wait for `let`, unless it is free."""

    def __init__(self, free: bool = True) -> None:
        self.batches: list[list[str]] = []
        self._free = free
        self._begun = threading.Semaphore(0)
        self._allowed = threading.Semaphore(0)

    def __call__(self, rows: Sequence[str]) -> list[str]:
        self.batches.append(list(rows))
        self._begun.release()
        if not self._free:
            assert self._allowed.acquire(timeout=PATIENCE_S)
        if any("bad" in row for row in rows):
            raise ValueError(f"can't do {', '.join(rows)}")
        return [row.upper() for row in rows]

    async def begun(self) -> None:
        """Return when the next pass has begun."""
        assert await asyncio.to_thread(self._begun.acquire, timeout=PATIENCE_S)

    def let(self, passes: int = 1) -> None:
        self._allowed.release(passes)


def run(model: Model, max_tokens: int, scene: Callable[[Batcher[str, str]], Coroutine[None, None, Found]]) -> Found:
    async def whole() -> Found:
        return await asyncio.wait_for(scene(Batcher(model, max_tokens)), PATIENCE_S)

    return asyncio.run(whole())


async def settle() -> None:
    """Let every task that can go on do so: each await of nothing is one turn of the loop."""
    for _ in range(10):
        await asyncio.sleep(0)


def words(count: int, seed: int, longest: int = 40) -> list[str]:
    lengths = np.random.default_rng(seed).integers(1, longest, count)
    return [f"{'abcdefghij'[number % 10]}" * int(length) for number, length in enumerate(lengths)]


@pytest.mark.parametrize("max_tokens", [1, 50, 200, 10_000])
def test_answers_come_in_the_order_of_rows_however_they_are_batched(max_tokens: int) -> None:
    rows, model = words(80, seed=1), Model()
    assert run(model, max_tokens, lambda batcher: batcher.outputs(rows)) == [row.upper() for row in rows]
    assert sorted(row for batch in model.batches for row in batch) == sorted(rows)


@pytest.mark.parametrize("max_tokens", [1, 39, 64, 300])
def test_rows_times_longest_stays_within_the_budget_but_for_a_row_alone(max_tokens: int) -> None:
    model = Model()
    run(model, max_tokens, lambda batcher: batcher.outputs(words(120, seed=2)))
    for batch in model.batches:
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= max_tokens
    if max_tokens == 300:
        assert len(model.batches) < 40


def test_a_batch_holds_rows_of_like_length() -> None:
    model = Model()
    run(model, 400, lambda batcher: batcher.outputs(words(200, seed=3)))
    cells = sum(len(batch) * max(map(len, batch)) for batch in model.batches)
    assert sum(len(row) for batch in model.batches for row in batch) / cells > 0.8


def test_a_lone_row_starts_at_once() -> None:
    model = Model(free=False)

    async def scene(batcher: Batcher[str, str]) -> list[str]:
        asked = asyncio.create_task(batcher.outputs(["alone"]))
        await model.begun()
        model.let()
        return await asked

    assert run(model, 1000, scene) == ["ALONE"]
    assert model.batches == [["alone"]]


def test_rows_that_arrive_during_a_pass_go_together_in_the_next() -> None:
    model = Model(free=False)

    async def scene(batcher: Batcher[str, str]) -> list[list[str]]:
        first = asyncio.create_task(batcher.outputs(["first"]))
        await model.begun()
        others = [asyncio.create_task(batcher.outputs([row])) for row in ("one", "two", "three")]
        await settle()
        model.let(2)
        return await asyncio.gather(first, *others)

    assert run(model, 1000, scene) == [["FIRST"], ["ONE"], ["TWO"], ["THREE"]]
    assert [sorted(batch) for batch in model.batches] == [["first"], ["one", "three", "two"]]


def test_a_long_row_is_in_the_very_next_batch_when_it_has_waited_longest() -> None:
    model = Model(free=False)
    long, short = "l" * 90, "s" * 10

    async def scene(batcher: Batcher[str, str]) -> None:
        first = asyncio.create_task(batcher.outputs(["first"]))
        await model.begun()
        waiting = [asyncio.create_task(batcher.outputs([row])) for row in (long, *[short] * 50)]
        await settle()
        model.let(20)
        await asyncio.gather(first, *waiting)

    run(model, 100, scene)
    assert long in model.batches[1]


def test_a_long_row_is_not_overtaken_for_ever_by_short_ones_that_keep_coming() -> None:
    model = Model(free=False)
    long, short = "l" * 90, "s" * 10

    async def scene(batcher: Batcher[str, str]) -> int:
        asked = [asyncio.create_task(batcher.outputs([row])) for row in [short] * 25]
        await model.begun()
        asked.append(asyncio.create_task(batcher.outputs([long])))
        passes = 1
        while not asked[25].done():
            # A full batch of newer short rows before every pass.
            asked.extend(asyncio.create_task(batcher.outputs([short])) for _ in range(10))
            await settle()
            model.let()
            await model.begun()
            passes += 1
        model.let(100)
        await asyncio.gather(*asked)
        return passes

    # 25 short rows were there before it, 10 to a batch; the pass that it is in, and the one after that begins.
    assert run(model, 100, scene) <= 5


def test_a_failing_batch_fails_its_own_rows_only_and_the_rest_go_on() -> None:
    model = Model()

    async def scene(batcher: Batcher[str, str]) -> list[list[str] | BaseException]:
        rows = ["good" * 5, "bad", "fine" * 9, "bad!"]
        calls = [batcher.outputs([row]) for row in rows]
        found = await asyncio.gather(*calls, return_exceptions=True)
        return [*found, await batcher.outputs(["after"])]

    good, bad, fine, also, after = run(model, 20, scene)
    assert (good, fine, after) == (["GOOD" * 5], ["FINE" * 9], ["AFTER"])
    assert all(isinstance(error, ValueError) and "can't do" in str(error) for error in (bad, also))


def test_a_call_whose_rows_fail_in_part_raises_what_forward_raised() -> None:
    with pytest.raises(ValueError, match="can't do bad"):
        run(Model(), 3, lambda batcher: batcher.outputs(["aaa", "bad", "ccc"]))


def test_a_forward_that_returns_too_few_rows_fails_them_instead_of_leaving_them_waiting() -> None:
    async def scene() -> None:
        batcher: Batcher[str, str] = Batcher(lambda rows: [row.upper() for row in rows][1:], 100)
        with pytest.raises(ValueError, match="shorter"):
            await asyncio.wait_for(batcher.outputs(["a", "b"]), PATIENCE_S)

    asyncio.run(scene())


def test_rows_of_a_cancelled_call_are_not_computed() -> None:
    model = Model(free=False)

    async def scene(batcher: Batcher[str, str]) -> list[str]:
        first = asyncio.create_task(batcher.outputs(["first"]))
        await model.begun()
        given_up = asyncio.create_task(batcher.outputs(["given", "up"]))
        kept = asyncio.create_task(batcher.outputs(["kept"]))
        await settle()
        given_up.cancel()
        await settle()
        model.let(2)
        await first
        return await kept

    assert run(model, 1000, scene) == ["KEPT"]
    assert model.batches == [["first"], ["kept"]]


def test_a_call_cancelled_during_its_pass_does_not_disturb_its_neighbours() -> None:
    model = Model(free=False)

    async def scene(batcher: Batcher[str, str]) -> list[list[str]]:
        calls = [asyncio.create_task(batcher.outputs([row])) for row in ("one", "two")]
        await model.begun()
        calls[0].cancel()
        await settle()
        model.let(2)
        return [await calls[1], await batcher.outputs(["after"])]

    assert run(model, 1000, scene) == [["TWO"], ["AFTER"]]


@pytest.mark.parametrize("seed", range(3))
def test_many_calls_at_once_each_get_their_own_answers(seed: int) -> None:
    model = Model()
    generator = np.random.default_rng(seed)
    asked = [words(int(generator.integers(1, 6)), seed=1000 * seed + number) for number in range(200)]

    async def scene(batcher: Batcher[str, str]) -> list[list[str]]:
        async def ask(number: int) -> list[str]:
            for _ in range(number % 7):
                await asyncio.sleep(0)
            return await batcher.outputs(asked[number])

        return list(await asyncio.gather(*(ask(number) for number in range(len(asked)))))

    assert run(model, 256, scene) == [[row.upper() for row in rows] for rows in asked]
    assert sum(map(len, model.batches)) == sum(map(len, asked))


def test_one_pass_runs_at_a_time() -> None:
    model = Model(free=False)

    async def scene(batcher: Batcher[str, str]) -> int:
        calls = [asyncio.create_task(batcher.outputs([row])) for row in words(30, seed=4)]
        await model.begun()
        await settle()
        calls.extend(asyncio.create_task(batcher.outputs([row])) for row in words(30, seed=5))
        await settle()
        begun = len(model.batches)
        model.let(60)
        await asyncio.gather(*calls)
        return begun

    assert run(model, 1, scene) == 1
    assert len(model.batches) == 60


def test_the_event_loop_goes_on_while_a_pass_runs() -> None:
    model = Model(free=False)

    async def scene(batcher: Batcher[str, str]) -> list[str]:
        asked = asyncio.create_task(batcher.outputs(["slow"]))
        await model.begun()
        # Only this code can let the pass end: a loop that waited for it would never come here.
        model.let()
        return await asked

    assert run(model, 10, scene) == ["SLOW"]


def test_no_rows_need_no_pass() -> None:
    model = Model()
    assert run(model, 10, lambda batcher: batcher.outputs([])) == []
    assert model.batches == []


def counting(upto: int, error: Exception | None = None) -> Callable[[Callable[[int], None]], None]:
    """What tells numbers, and then raises."""

    def write(tell: Callable[[int], None]) -> None:
        for number in range(upto):
            tell(number)
        if error is not None:
            raise error

    return write


def test_a_stream_tells_its_pieces_in_order() -> None:
    async def scene(batcher: Batcher[str, str]) -> list[int]:
        return [piece async for piece in batcher.stream(counting(500))]

    assert run(Model(), 10, scene) == list(range(500))


def test_a_stream_and_passes_take_turns_in_one_thread() -> None:
    model = Model(free=False)

    def write(tell: Callable[[int], None]) -> None:
        for number in range(3):
            model.batches.append([str(number)])
            tell(number)

    async def scene(batcher: Batcher[str, str]) -> None:
        async def streamed() -> list[int]:
            return [piece async for piece in batcher.stream(write)]

        first = asyncio.create_task(batcher.outputs(["first"]))
        await model.begun()
        second, stream = asyncio.create_task(batcher.outputs(["second"])), asyncio.create_task(streamed())
        await settle()
        model.let(2)
        assert [await first, await second, await stream] == [["FIRST"], ["SECOND"], [0, 1, 2]]

    run(model, 10, scene)
    assert model.batches == [["first"], ["0"], ["1"], ["2"], ["second"]]


def test_a_slow_listener_holds_up_nobody() -> None:
    async def scene(batcher: Batcher[str, str]) -> list[int]:
        async with aclosing(batcher.stream(counting(50))) as pieces:
            found = [await anext(pieces)]
            # The row's pass comes after the whole stream, of which one piece was read.
            assert await batcher.outputs(["row"]) == ["ROW"]
            return found + [piece async for piece in pieces]

    assert run(Model(), 10, scene) == list(range(50))


def test_a_stream_raises_what_went_wrong_after_the_pieces_before_it_and_the_batcher_goes_on() -> None:
    async def scene(batcher: Batcher[str, str]) -> tuple[list[int], list[str]]:
        async with aclosing(batcher.stream(counting(2, ValueError("half way")))) as pieces:
            found = [await anext(pieces), await anext(pieces)]
            with pytest.raises(ValueError, match="half way"):
                await anext(pieces)
        return found, await batcher.outputs(["after"])

    assert run(Model(), 10, scene) == ([0, 1], ["AFTER"])


def test_a_stream_that_nobody_waits_for_does_not_begin() -> None:
    model = Model(free=False)
    begun: list[str] = []

    async def scene(batcher: Batcher[str, str]) -> list[list[str]]:
        def write(tell: Callable[[int], None]) -> None:
            begun.append("stream")
            tell(0)

        async def listen() -> None:
            async with aclosing(batcher.stream(write)) as pieces:
                await anext(pieces)

        first = asyncio.create_task(batcher.outputs(["first"]))
        await model.begun()
        left = asyncio.create_task(listen())
        await settle()
        left.cancel()
        await settle()
        model.let(2)
        return [await first, await batcher.outputs(["after"])]

    assert run(model, 10, scene) == [["FIRST"], ["AFTER"]]
    assert begun == []
