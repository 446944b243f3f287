"""Which rows make a batch: every row once, alike in length, and the same whoever asks and however many workers."""

import numpy as np
import pytest

from banjoray.config.section import validate
from banjoray.config.train import TrainConfig
from banjoray.data.batches import (
    batches_of,
    epoch_batches,
    padded,
    rounded_up,
    shares,
    sorted_batches,
    targets_of,
    token_batches,
    width_of,
)
from banjoray.data.tokens import IGNORED, Tokens

TOKENS = [(0, 100), (1, 1), (2, 100), (7, 30), (97, 128), (1000, 1024), (3001, 4096), (3001, 10**7)]
SIZES = [(1, 1), (5, 8), (8, 8), (97, 8), (1000, 32), (3001, 16)]


def lengths_of(rows: int, seed: int = 5) -> np.ndarray:
    """Lengths as texts have them: many short, a few long."""
    return np.clip(np.random.default_rng(seed).lognormal(3, 0.6, rows), 3, 128).astype(np.int64)


def padding(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """The share of cells that hold nothing."""
    cells = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - int(lengths.sum()) / cells


def as_lists(batches: list[np.ndarray]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_an_epoch_has_every_row_exactly_once_in_full_batches_but_one(rows: int, size: int) -> None:
    for epoch in range(3):
        batches = epoch_batches(lengths_of(rows), size, 1, epoch)
        assert sorted(np.concatenate(batches).tolist()) == list(range(rows))
        assert sorted((len(batch) for batch in batches), reverse=True)[: rows // size] == [size] * (rows // size)
        assert len(batches) == -(-rows // size)


def test_an_epoch_is_a_pure_function_of_seed_and_epoch() -> None:
    lengths = lengths_of(500)
    first = as_lists(epoch_batches(lengths, 16, 3, 2))
    epoch_batches(lengths, 16, 3, 1)
    assert as_lists(epoch_batches(lengths.copy(), 16, 3, 2)) == first


def test_epochs_and_seeds_differ_in_rows_and_order() -> None:
    lengths = lengths_of(500)
    runs = [as_lists(epoch_batches(lengths, 16, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len({str(run) for run in runs}) == 9
    # Not the same batches in another order: rows meet other rows.
    assert len({str(sorted(map(sorted, run))) for run in runs}) == 9


def test_the_order_of_batches_does_not_follow_length() -> None:
    lengths = lengths_of(1600)
    longest = [int(lengths[batch].max()) for batch in epoch_batches(lengths, 16, 0, 0)]
    # Sorted, or sorted in a few runs, it would hardly ever rise.
    rises = int((np.diff(longest) > 0).sum())
    assert 0.3 < rises / len(longest) < 0.7


def test_rows_of_a_batch_are_longest_first_and_pad_far_less_than_at_random() -> None:
    lengths = lengths_of(2000)
    for epoch in range(3):
        batches = epoch_batches(lengths, 32, 0, epoch)
        assert all((np.diff(lengths[batch]) <= 0).all() for batch in batches)
        order = np.random.default_rng(epoch).permutation(len(lengths))
        at_random = [order[start : start + 32] for start in range(0, len(order), 32)]
        assert padding(lengths, batches) < 0.4 * padding(lengths, at_random)


@pytest.mark.parametrize(("rows", "budget"), TOKENS)
def test_token_batches_hold_every_row_once_within_the_budget_longest_first(rows: int, budget: int) -> None:
    for seed in range(3):
        lengths = lengths_of(rows, seed)
        for epoch in range(3):
            batches = token_batches(lengths, budget, seed, epoch)
            assert sorted(row for batch in as_lists(batches) for row in batch) == list(range(rows))
            for batch in batches:
                assert len(batch) == 1 or len(batch) * int(lengths[batch].max()) <= budget
                assert (np.diff(lengths[batch]) <= 0).all()


def test_token_batches_are_a_pure_function_of_seed_epoch_and_lengths() -> None:
    lengths = lengths_of(500)
    first = as_lists(token_batches(lengths, 512, 3, 2))
    token_batches(lengths, 512, 3, 1)
    np.random.default_rng(0).random()
    assert as_lists(token_batches(lengths.copy(), 512, 3, 2)) == first
    assert lengths.tolist() == lengths_of(500).tolist()


def test_token_batches_differ_by_epoch_and_seed_in_rows_and_order() -> None:
    lengths = lengths_of(500)
    runs = [as_lists(token_batches(lengths, 512, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len({str(run) for run in runs}) == 9
    assert len({str(sorted(map(sorted, run))) for run in runs}) == 9


def test_few_rows_that_meet_in_a_token_batch_meet_again_in_the_next_epoch() -> None:
    lengths = lengths_of(3001)
    place = np.empty(len(lengths), dtype=np.int64)
    for number, batch in enumerate(token_batches(lengths, 1024, 0, 1)):
        place[batch] = number
    met = again = 0
    for batch in token_batches(lengths, 1024, 0, 0):
        together = np.bincount(place[batch])
        met, again = met + len(batch) * (len(batch) - 1), again + int((together * (together - 1)).sum())
    assert again < 0.25 * met


def test_token_batches_pad_little_and_are_nearly_full() -> None:
    lengths = lengths_of(3001)
    for epoch in range(3):
        batches = token_batches(lengths, 1024, 0, epoch)
        assert padding(lengths, batches) < 0.08
        assert sum(len(batch) * int(lengths[batch].max()) for batch in batches) > 0.9 * 1024 * len(batches)


def test_the_order_of_token_batches_does_not_follow_length() -> None:
    lengths = lengths_of(3001)
    longest = [int(lengths[batch].max()) for batch in token_batches(lengths, 512, 0, 0)]
    rises = int((np.diff(longest) > 0).sum())
    assert 0.3 < rises / len(longest) < 0.7


def test_rows_longer_than_the_budget_are_token_batches_of_their_own() -> None:
    batches = as_lists(token_batches(np.array([3, 50, 4, 3, 60]), 10, 0, 0))
    assert [1] in batches
    assert [4] in batches
    assert as_lists(token_batches(np.full(5, 7), 1, 0, 0)) != [[0], [1], [2], [3], [4]]
    assert sorted(as_lists(token_batches(np.full(5, 7), 1, 0, 0))) == [[0], [1], [2], [3], [4]]


def test_a_job_chooses_rows_or_tokens_and_its_seed_counts() -> None:
    lengths = lengths_of(300)

    def made(**changes: object) -> list[list[int]]:
        return as_lists(batches_of(lengths, validate(TrainConfig, changes, "train"), 1))

    assert made(batch_size=8, seed=4) == as_lists(epoch_batches(lengths, 8, 4, 1))
    tokens = {"mode": "tokens", "max_tokens": 700}
    assert made(batch_size=8, seed=4, batching=tokens) == as_lists(token_batches(lengths, 700, 4, 1))
    assert made(batching=tokens, seed=5) != made(batching=tokens, seed=4)
    assert made(batching={"mode": "rows", "max_tokens": 1}, batch_size=8, seed=4) == made(batch_size=8, seed=4)


@pytest.mark.parametrize("microbatches", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 5, 12, 32, 33])
def test_workers_share_a_batch_without_loss_and_evenly(rows: int, workers: int, microbatches: int) -> None:
    batch = np.random.default_rng(rows).permutation(1000)[:rows]
    dealt = shares(batch, workers, microbatches)
    assert [len(mine) for mine in dealt] == [microbatches] * workers
    parts = [part for mine in dealt for part in mine]
    assert sorted(np.concatenate(parts).tolist()) == sorted(batch.tolist())
    for number in range(microbatches):
        sizes = [len(mine[number]) for mine in dealt]
        assert max(sizes) - min(sizes) <= 1
    together = [sum(len(mine[number]) for mine in dealt) for number in range(microbatches)]
    assert max(together) - min(together) <= 1


def test_one_worker_in_one_microbatch_gets_the_batch_as_it_is() -> None:
    batch = np.array([4, 2, 9])
    assert shares(batch, 1, 1)[0][0].tolist() == [4, 2, 9]


def test_neighbours_in_length_go_to_different_workers() -> None:
    lengths = np.sort(lengths_of(64))[::-1]
    dealt = shares(np.arange(64), 2, 1)
    tokens = [int(lengths[mine[0]].sum()) for mine in dealt]
    assert max(tokens) <= 1.1 * min(tokens)


@pytest.mark.parametrize("budget", [1, 100, 128, 1000, 8192])
def test_sorted_batches_hold_every_row_once_within_the_budget(budget: int) -> None:
    lengths = lengths_of(700)
    batches = sorted_batches(lengths, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(700))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * int(lengths[batch].max()) <= budget
    assert (np.diff(lengths[np.concatenate(batches)]) <= 0).all()


def test_sorted_batches_are_as_full_as_the_budget_allows() -> None:
    lengths = lengths_of(700)
    for batch, following in zip(*(sorted_batches(lengths, 1000)[start:] for start in (0, 1)), strict=False):
        assert len(following) > 0
        assert (len(batch) + 1) * int(lengths[batch].max()) > 1000


def test_a_row_longer_than_the_budget_goes_alone() -> None:
    batches = sorted_batches(np.array([3, 50, 4, 3, 60]), 10)
    assert as_lists(batches) == [[4], [1], [2, 0], [3]]


def test_no_rows_make_no_batches() -> None:
    assert sorted_batches(np.array([], dtype=np.int64), 10) == []


def test_numbers_are_rounded_up_to_eight_between_two_powers_of_two() -> None:
    for low in (64, 128, 4096):
        found = {rounded_up(number, 4) for number in range(low + 1, 2 * low + 1)}
        assert found == {low + low // 8 * part for part in range(1, 9)}
    assert [rounded_up(number, 4) for number in (0, 1, 4, 5, 31, 33)] == [0, 4, 4, 8, 32, 36]
    assert [rounded_up(number) for number in (1, 15, 16, 17, 33, 129, 1025)] == [1, 15, 16, 18, 36, 144, 1152]


def test_coarse_widths_hold_every_row_and_are_never_above_the_longest_of_all() -> None:
    for longest in range(1, 71):
        lengths = np.array([1, longest])
        assert width_of(lengths, False, 70) == longest
        assert longest <= width_of(lengths, True, 70) <= 70
    assert len({width_of(np.array([longest]), True, 70) for longest in range(1, 71)}) <= 18


def test_wider_batches_hold_the_same_cells_and_padding() -> None:
    offsets = np.array([0, 3, 8, 17])
    streams = {"input_ids": np.arange(1, 18, dtype=np.int32)}
    tokens = Tokens(streams, offsets, np.arange(17), target_offsets=offsets)
    rows = np.array([1, 0])
    narrow, wide = padded(tokens, rows, 99), padded(tokens, rows, 99, 8)
    assert wide["input_ids"].shape == wide["attention_mask"].shape == (2, 8)
    np.testing.assert_array_equal(wide["input_ids"][:, :5], narrow["input_ids"])
    np.testing.assert_array_equal(wide["attention_mask"][:, :5], narrow["attention_mask"])
    assert (wide["input_ids"][:, 5:] == 99).all()
    assert not wide["attention_mask"][:, 5:].any()
    targets = targets_of(tokens, rows, coarse=True)
    np.testing.assert_array_equal(targets[:, :5], targets_of(tokens, rows))
    assert targets.shape == (2, 8)
    assert (targets[:, 5:] == IGNORED).all()
