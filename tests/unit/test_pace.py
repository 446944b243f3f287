"""What waits, as it is predicted, and costs that follow the machine: by fake passes that move a clock of their own."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing

import numpy as np
import pytest

from banjoray.serving.batching import Batcher
from banjoray.serving.costs import FREE, MOST_AT_ONCE, MOST_IN_ALL, NEWEST, Adaptive, Cost
from banjoray.serving.pace import Pace

PATIENCE_S = 60.0
CELLS = Cost(fixed=0.010, per_cell=0.001)
SHORT = np.random.default_rng(1).integers(3, 12, 200).tolist()
MIXED = [400 if number % 20 == 0 else int(length) for number, length in enumerate(SHORT)]


class Machine:
    """A forward whose passes take ``slower`` times what ``cost`` says, by a clock of their own; the first can wait."""

    def __init__(self, cost: Cost, slower: float = 1.0) -> None:
        self.cost, self.slower = cost, slower
        self.now = 0.0
        self.batches: list[list[int]] = []
        self.error: Exception | None = None
        self.go = threading.Event()
        self.go.set()

    def __call__(self, rows: Sequence[str]) -> list[str]:
        assert self.go.wait(PATIENCE_S)
        lengths = [len(row) for row in rows]
        self.batches.append(lengths)
        self.now += self.slower * self.cost(len(rows), max(lengths))
        if self.error is not None:
            raise self.error
        return [row.upper() for row in rows]


def batcher_of(machine: Machine, cost: Cost, target_s: float = 0.1) -> Batcher[str, str]:
    return Batcher(machine, 10**6, cost, target_s, clock=lambda: machine.now)


def run(scene: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, PATIENCE_S))


async def predicted_and_taken(batcher: Batcher[str, str], machine: Machine, lengths: Sequence[int]) -> list[float]:
    """What rows are predicted to take that come while a short pass runs, and what they do take, with that pass."""
    machine.go.clear()
    calls = [asyncio.create_task(batcher.outputs(["f"]))]
    await asyncio.sleep(0)
    began = machine.now
    calls += [asyncio.create_task(batcher.outputs(["r" * length])) for length in lengths]
    await asyncio.sleep(0)
    predicted = batcher.pace.wait_s()
    machine.go.set()
    await asyncio.gather(*calls)
    return [predicted, machine.now - began]


@pytest.mark.parametrize("lengths", [[8] * 100, SHORT, MIXED, [5], []])
@pytest.mark.parametrize(
    "cost", [CELLS, Cost(fixed=0.05, per_cell=1e-4), Cost(per_cell=1e-3), Cost(1e-3, 1e-4, 1e-5, 2e-8)]
)
def test_rows_that_wait_take_what_is_predicted_though_they_share_passes(lengths: list[int], cost: Cost) -> None:
    machine = Machine(cost)

    async def scene() -> None:
        batcher = batcher_of(machine, cost)
        for within in (0.5, 0.3):
            # The first time it knows nothing of how these rows fit together.
            predicted, taken = await predicted_and_taken(batcher, machine, lengths)
            assert predicted == pytest.approx(taken, rel=within, abs=0.1)
        assert batcher.pace.wait_s() == 0

    run(scene())


def test_rows_that_share_passes_are_not_predicted_to_take_what_they_would_alone() -> None:
    cost = Cost(fixed=0.05, per_cell=1e-4)
    machine = Machine(cost)

    async def scene() -> None:
        predicted, _ = await predicted_and_taken(batcher_of(machine, cost), machine, SHORT)
        assert predicted < sum(cost(1, length) for length in SHORT) / 10

    run(scene())


@pytest.mark.parametrize("slower", [0.25, 1.0, 3.0, 10.0])
def test_predictions_and_batches_follow_a_machine_that_became_faster_or_slower(slower: float) -> None:
    machine = Machine(CELLS)

    async def scene() -> None:
        batcher = batcher_of(machine, CELLS)
        await predicted_and_taken(batcher, machine, SHORT)
        before = max(map(len, machine.batches))
        machine.slower = slower
        for _ in range(3):
            await predicted_and_taken(batcher, machine, SHORT)
        machine.batches.clear()
        predicted, taken = await predicted_and_taken(batcher, machine, SHORT)
        assert predicted == pytest.approx(taken, rel=0.25)
        assert batcher.pace.cost.factor == pytest.approx(slower, rel=0.1)
        after = max(map(len, machine.batches))
        assert (after > before) == (slower < 1)
        assert (after < before) == (slower > 1)

    run(scene())


@pytest.mark.parametrize("seconds", [1e9, 1e-9])
def test_one_strange_pass_moves_a_cost_little_and_many_move_it_so_far_and_no_farther(seconds: float) -> None:
    cost = Adaptive(CELLS)
    cost.learn(4, 10, seconds)
    little = MOST_AT_ONCE**NEWEST
    assert cost.factor == pytest.approx(little if seconds > 1 else 1 / little)
    assert cost(4, 10) == pytest.approx(cost.factor * CELLS(4, 10))
    for _ in range(1000):
        cost.learn(4, 10, seconds)
    assert cost.factor == (MOST_IN_ALL if seconds > 1 else 1 / MOST_IN_ALL)


def test_passes_that_take_what_was_fitted_change_nothing_and_free_ones_have_nothing_to_change() -> None:
    cost, free = Adaptive(CELLS), Adaptive(FREE)
    for rows in (1, 5, 9):
        cost.learn(rows, 10 * rows, CELLS(rows, 10 * rows))
        free.learn(rows, 10, 1.0)
    assert cost.factor == pytest.approx(1)
    assert (free.factor, free(3, 4)) == (1.0, 0.0)


def test_a_pass_that_fails_teaches_nothing_and_is_waited_for_no_more() -> None:
    machine = Machine(CELLS, slower=5)
    machine.error = ValueError("broken")

    async def scene() -> None:
        batcher = batcher_of(machine, CELLS)
        for _ in range(3):
            with pytest.raises(ValueError, match="broken"):
                await batcher.outputs(["a" * 20, "b" * 20])
        assert (batcher.pace.cost.factor, batcher.pace.wait_s()) == (1.0, 0)

    run(scene())
    assert machine.batches == [[20, 20]] * 3


def test_rows_that_nobody_waits_for_are_waited_for_no_more() -> None:
    machine = Machine(CELLS)
    machine.go.clear()

    async def scene() -> None:
        batcher = batcher_of(machine, CELLS)
        first = asyncio.create_task(batcher.outputs(["f"]))
        await asyncio.sleep(0)
        alone = batcher.pace.wait_s()
        gone = asyncio.create_task(batcher.outputs(["gone" * 100] * 50))
        await asyncio.sleep(0)
        assert batcher.pace.wait_s() > 100 * alone
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert batcher.pace.wait_s() == pytest.approx(alone)
        machine.go.set()
        await first
        assert batcher.pace.wait_s() == 0

    run(scene())
    assert machine.batches == [[1]]


def test_where_passes_have_no_cost_rows_take_the_mean_time_of_rows() -> None:
    now = [0.0]
    pace = Pace(FREE, clock=lambda: now[0])

    def passed(rows: int, seconds: float) -> None:
        for _ in range(rows):
            pace.joined(7)
        turn = pace.passing([7] * rows)
        with pace.timed(turn):
            now[0] += seconds
        pace.ended(turn)

    passed(2, 4.0)
    for _ in range(5):
        pace.joined(7)
    assert pace.wait_s() == pytest.approx(5 * 2.0)
    for _ in range(5):
        pace.left(7)
    # Sixteen rows weigh more than the two before.
    passed(16, 8.0)
    pace.joined(7)
    assert 0.5 < pace.wait_s() < 1.0


def test_before_a_row_has_ended_each_is_taken_to_need_as_long_as_the_one_that_runs_has_needed() -> None:
    now = [0.0]
    pace = Pace(FREE, clock=lambda: now[0])
    pace.joined(7)
    turn = pace.passing([7])
    for _ in range(10):
        pace.joined(7)
    assert pace.wait_s() == 0
    turn.began = 0.0
    now[0] = 3.0
    assert pace.wait_s() == pytest.approx(30)


def test_a_stream_counts_as_a_row_until_it_ends_and_its_time_is_known_from_then_on() -> None:
    now = [0.0]
    batcher: Batcher[str, str] = Batcher(lambda rows: list(rows), 100, clock=lambda: now[0])

    def write(tell: Callable[[int], None]) -> None:
        for number in range(4):
            now[0] += 1.0
            tell(number)

    async def scene() -> None:
        assert [piece async for piece in batcher.stream(write)] == [0, 1, 2, 3]
        assert batcher.pace.wait_s() == 0
        hold = threading.Event()

        def held(tell: Callable[[int], None]) -> None:
            tell(0)
            assert hold.wait(PATIENCE_S)

        async with aclosing(batcher.stream(held)) as first:
            await anext(first)
            assert batcher.pace.wait_s() == pytest.approx(4)
            now[0] += 1.0
            assert batcher.pace.wait_s() == pytest.approx(3)
            second = asyncio.create_task(batcher.outputs(["a", "b"]))
            await asyncio.sleep(0)
            # A pass of two rows is behind it in the thread.
            assert batcher.pace.wait_s() == pytest.approx(3 + 2 * 4)
            hold.set()
        await second
        assert batcher.pace.wait_s() == 0

    run(scene())
