"""What passes cost decides what goes together: fitted from measurements, and batches by fake costs, without a clock."""

import asyncio
import itertools
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from banjoray.serving.batching import PATIENCE, Batcher, Limits, batch_of
from banjoray.serving.costs import FREE, HANDOVER_S, LENGTHS, ROWS, Cost, fitted, measured
from banjoray.serving.pace import FIXED_PARTS

WIDE = Limits(10**6)
# A pass costs 10, a cell 1, in milliseconds.
CELLS = Cost(fixed=0.010, per_cell=0.001)


@pytest.mark.parametrize(
    "cost", [Cost(0.002, 1e-4, 1e-5, 2e-8), Cost(0.0, 0.0, 3e-5, 0.0), Cost(0.05, 0.0, 1e-4, 1e-7)]
)
def test_the_cost_that_made_some_times_is_found_again(cost: Cost) -> None:
    shapes = [(rows, length) for rows in ROWS for length in LENGTHS]
    found = fitted([(rows, length, cost(rows, length)) for rows, length in shapes])
    for rows, length in [*shapes, (3, 50), (12, 200)]:
        assert found(rows, length) == pytest.approx(cost(rows, length), rel=1e-3)


def test_no_part_of_a_cost_is_below_zero_whatever_was_measured() -> None:
    generator = np.random.default_rng(3)
    samples = [(rows, length, float(generator.uniform(1e-4, 1e-2))) for rows in ROWS for length in LENGTHS]
    found = fitted(samples)
    assert min(found.fixed, found.per_row, found.per_cell, found.per_square) >= 0


def test_measuring_stops_when_its_time_is_used_up_and_never_asks_for_longer_rows_than_there_are() -> None:
    now, asked = [0.0], list[tuple[int, int]]()

    def forward(rows: list[str]) -> None:
        asked.append((len(rows), max(map(len, rows))))
        now[0] += CELLS(len(rows), len(rows[0]))

    def words(tokens: int) -> str:
        return "w" * tokens

    short = measured(forward, words, 40, budget_s=0.2, clock=lambda: now[0])
    few = len(asked)
    assert now[0] < 0.4
    asked.clear()
    whole = measured(forward, words, 40, budget_s=1e6, clock=lambda: now[0])
    assert few < len(asked)
    assert max(length for _, length in asked) == 40
    assert max(rows for rows, _ in asked) == max(ROWS)
    for found in (short, whole):
        assert found.fixed == pytest.approx(CELLS.fixed + HANDOVER_S, rel=0.01)
        assert found.per_cell == pytest.approx(CELLS.per_cell, rel=0.01)


def test_short_rows_are_not_padded_to_a_long_one_where_two_passes_cost_less() -> None:
    assert batch_of([400, 10, 10, 10], CELLS, WIDE) == [0]
    assert batch_of([10, 400, 10, 10], CELLS, WIDE) == [0, 2, 3]


def test_rows_are_padded_where_that_costs_less_than_another_pass() -> None:
    assert batch_of([20, 15, 14], CELLS, WIDE) == [0, 1]
    assert sorted(batch_of([20, 15, 15], CELLS, WIDE)) == [0, 1, 2]
    assert sorted(batch_of([15, 20, 15], CELLS, WIDE)) == [0, 1, 2]
    dear = Cost(fixed=10.0, per_cell=0.001)
    assert sorted(batch_of([400, 10, 10, 10], dear, WIDE)) == [0, 1, 2, 3]


@pytest.mark.parametrize("target_s", [0.05, 0.1, 0.5])
def test_a_batch_is_predicted_to_end_in_time_but_for_a_row_alone(target_s: float) -> None:
    lengths = np.random.default_rng(1).integers(5, 60, 200).tolist()
    batch = batch_of(lengths, CELLS, Limits(10**6, target_s))
    assert CELLS(len(batch), max(lengths[row] for row in batch)) <= target_s
    assert batch_of([900, 900], CELLS, Limits(10**6, target_s)) == [0]


def test_a_target_below_what_every_pass_costs_does_not_end_batching() -> None:
    heavy = Cost(fixed=1.0, per_cell=0.001)
    batch = batch_of([10] * 1000, heavy, Limits(10**6, 0.001))
    assert len(batch) == pytest.approx((FIXED_PARTS - 1) / 0.01, abs=1)


def test_no_rows_make_no_batch_and_tokens_are_bounded_whatever_they_cost() -> None:
    assert batch_of([], CELLS, WIDE) == []
    assert len(batch_of([10] * 50, FREE, Limits(95))) == 9


class Recorded:
    """A forward whose first pass waits until it is let go, so that everything else queues up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()

    def __call__(self, rows: Sequence[str]) -> list[str]:
        self.batches.append([len(row) for row in rows])
        assert self.go.wait(60)
        return [row.upper() for row in rows]


def passes(cost: Cost, lengths: Sequence[int]) -> list[list[int]]:
    """The lengths in each pass when rows of ``lengths`` come one after the other during a first pass."""
    forward = Recorded()

    async def scene() -> None:
        batcher: Batcher[str, str] = Batcher(forward, 10**6, cost, 0.1)
        first = asyncio.create_task(batcher.outputs(["f"]))
        await asyncio.sleep(0)
        rest = [asyncio.create_task(batcher.outputs(["r" * length])) for length in lengths]
        await asyncio.sleep(0)
        forward.go.set()
        assert await first == ["F"]
        assert [row for (row,) in await asyncio.gather(*rest)] == ["R" * length for length in lengths]

    asyncio.run(asyncio.wait_for(scene(), 60))
    return forward.batches[1:]


def test_short_rows_pass_a_long_one_that_came_before_them() -> None:
    found = passes(CELLS, [400, *[10] * 30])
    assert found[-1] == [400]
    assert sum(map(len, found)) == 31


def test_a_row_is_passed_for_so_long_as_its_own_cost_says_and_no_longer() -> None:
    # Each comes when the one before it is done: there is a short row waiting at every turn, for ever.
    forward, left = Recorded(), 2000
    forward.go.set()

    async def scene() -> int:
        batcher: Batcher[str, str] = Batcher(forward, 10**6, CELLS, 0.1)

        async def short() -> None:
            nonlocal left
            while left and not long.done():
                left -= 1
                await batcher.outputs(["s" * 10])

        long = asyncio.create_task(batcher.outputs(["l" * 400]))
        others = [asyncio.create_task(short()) for _ in range(4)]
        await long
        await asyncio.gather(*others)
        return [400] in forward.batches

    assert asyncio.run(asyncio.wait_for(scene(), 60))
    assert left > 0
    before = forward.batches[: forward.batches.index([400])]
    spent = sum(CELLS(len(batch), max(batch)) for batch in before)
    # One pass may begin just before the row is due.
    assert spent <= PATIENCE * CELLS(1, 400) + 0.1


def test_between_long_rows_that_are_due_shorter_ones_have_as_much_time() -> None:
    now, going = [0.0], True
    took: list[tuple[int, float]] = []

    def forward(rows: Sequence[str]) -> list[str]:
        longest = max(map(len, rows))
        took.append((longest, CELLS(len(rows), longest)))
        now[0] += took[-1][1]
        return list(rows)

    async def scene() -> None:
        nonlocal going
        batcher: Batcher[str, str] = Batcher(forward, 10**6, CELLS, 0.1, clock=lambda: now[0])

        async def short() -> None:
            while going:
                await batcher.outputs(["s" * 10])

        others = [asyncio.create_task(short()) for _ in range(40)]
        await asyncio.gather(*(batcher.outputs(["l" * 400]) for _ in range(4)))
        going = False
        await asyncio.gather(*others)
        # Nobody is there to have the time after these.
        assert await batcher.outputs(["l" * 400]) == ["l" * 400]
        assert batcher._worker is not None
        await batcher._worker

    asyncio.run(asyncio.wait_for(scene(), 60))
    long = [number for number, (longest, _) in enumerate(took) if longest == 400]
    assert len(long) == 5
    for earlier, later in itertools.pairwise(long[:4]):
        shorter = [seconds for _, seconds in took[earlier + 1 : later]]
        # No less, and nothing more begins when they have had it; but for rounding.
        assert sum(shorter) > 0.999 * took[earlier][1]
        assert sum(shorter[:-1]) < 1.001 * took[earlier][1]


def test_rows_of_one_length_keep_their_order_under_any_cost() -> None:
    forward = Recorded()

    async def scene() -> None:
        batcher: Batcher[str, str] = Batcher(forward, 10**6, CELLS, 0.03)
        calls = [asyncio.create_task(batcher.outputs(["r" * 8])) for _ in range(20)]
        done: list[int] = []
        for number, call in enumerate(calls):
            call.add_done_callback(lambda _, number=number: done.append(number))  # type: ignore[misc]
        await asyncio.sleep(0)
        forward.go.set()
        await asyncio.gather(*calls)
        await asyncio.sleep(0)
        assert done == sorted(done)

    asyncio.run(asyncio.wait_for(scene(), 60))
    assert len(forward.batches) > 5
