"""Which rows make a batch, and batches as padded arrays.

The order of rows is a pure function of (seed, epoch, lengths): it does not know how many workers there are,
so that two workers see together what one would have seen alone, and a resumed run goes on at the same row.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from banjoray.config.train import TrainConfig
from banjoray.data.tokens import IGNORED, Tokens

# Rows are shuffled, then sorted by length within groups: of at most so many batches, at least so many groups, as in
# transformers' LengthGroupedSampler. 10.5 % of the cells of 2,000 emotion rows are padding, 3.2 % of 16,000. Groups
# twice as large pad half as much and learn less: two epochs over 2,000 rows gave 0.700 and 0.596, not 0.735 and 0.675.
GROUP_BATCHES, GROUPS = 50, 4
# Batches of a number of tokens hold more of the short rows, which would meet each other again in the next epoch.
TOKEN_GROUP_BATCHES, TOKEN_GROUPS = 50, 4


def batches_of(lengths: np.ndarray, train: TrainConfig, epoch: int) -> list[np.ndarray]:
    """The global batches of an epoch, as ``train.batching`` wants them; in mode tokens their number varies by epoch."""
    if train.batching.mode == "tokens":
        return token_batches(lengths, train.batching.max_tokens, train.seed, epoch)
    return epoch_batches(lengths, train.batch_size, train.seed, epoch)


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The global batches of an epoch: row numbers, ``batch_size`` each but for one smaller batch.

    Rows of a batch are of similar length, longest first; the order of batches is shuffled.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches: list[np.ndarray] = []
    size = batch_size * max(1, min(GROUP_BATCHES, len(order) // (batch_size * GROUPS)))
    for start in range(0, len(order), size):
        group = order[start : start + size]
        group = group[np.argsort(-lengths[group], kind="stable")]
        batches.extend(group[first : first + batch_size] for first in range(0, len(group), batch_size))
    return [batches[number] for number in generator.permutation(len(batches))]


def token_batches(lengths: np.ndarray, max_tokens: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The global batches of an epoch whose padded size (rows x longest) is at most ``max_tokens``.

    Rows of a batch are of similar length, longest first; the order of batches is shuffled. A row that is longer than
    ``max_tokens`` is a batch of its own. How many batches there are differs a little from epoch to epoch.
    """
    # Groups as in epoch_batches, sorted down and up in turn, so that no batch ends short where a group does. On 16,000
    # emotion texts and 4,096 tokens this pads 5.3 %, and 17 % of the rows that meet meet again in the next epoch (26 %
    # in the worst batch); one sort over all rows, ties shuffled, pads 1.7 %, but 37 % (84 %) meet again.
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    if not len(order):
        return []
    rows = min(TOKEN_GROUP_BATCHES * max_tokens / max(1.0, float(lengths.mean())), len(order) / TOKEN_GROUPS)
    size = max(1, int(rows))
    for number, start in enumerate(range(0, len(order), size)):
        group = order[start : start + size]
        direction = 1 if number % 2 else -1
        order[start : start + size] = group[np.argsort(direction * lengths[group], kind="stable")]
    batches = [batch[np.argsort(-lengths[batch], kind="stable")] for batch in _filled(order, lengths, max_tokens)]
    return [batches[number] for number in generator.permutation(len(batches))]


def _filled(order: np.ndarray, lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """``order`` cut into batches, each as long as ``max_tokens`` padded tokens allow and at least one row long."""
    start = longest = 0
    for end, length in enumerate(lengths[order].tolist()):
        longest = max(longest, length)
        if end > start and longest * (end + 1 - start) > max_tokens:
            yield order[start:end]
            start, longest = end, length
    yield order[start:]


def shares(batch: np.ndarray, workers: int, microbatches: int) -> list[list[np.ndarray]]:
    """``batch`` dealt out: ``[worker][microbatch]`` -> row numbers, some possibly empty.

    Neighbours in length go to different workers, so that workers wait for each other as little as possible.
    """
    chunks = np.array_split(batch, microbatches)
    return [[chunk[worker::workers] for chunk in chunks] for worker in range(workers)]


def sorted_batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """All rows, longest first, in batches whose padded size (rows x longest) is at most ``max_tokens``.

    A row that is longer than ``max_tokens`` is a batch of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        rows = max(1, max_tokens // int(max(1, lengths[order[start]])))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def padded(
    tokens: Tokens, rows: Sequence[int] | np.ndarray, pad_id: int, width: int | None = None
) -> dict[str, np.ndarray]:
    """The model inputs of some rows, (rows, width) int64, padded on the right, with their attention mask.

    ``width`` None: as the longest of them.
    """
    lengths = tokens.lengths[rows]
    mask = np.arange(int(lengths.max()) if width is None else width) < lengths[:, None]
    inputs = {
        name: _cells(stream, tokens.offsets, rows, mask, pad_id if name == "input_ids" else 0)
        for name, stream in tokens.streams.items()
    }
    inputs["attention_mask"] = mask.astype(np.int64)
    return inputs


def width_of(lengths: np.ndarray, coarse: bool, most: int) -> int:
    """The columns of a batch of rows of those lengths: as the longest, ``coarse``: or a few more, so that widths recur.

    Coarse widths are multiples of 4, and eight between two powers of two; but at most ``most``, as of all rows.
    """
    longest = int(lengths.max())
    return min(rounded_up(longest, 4), most) if coarse else longest


def rounded_up(number: int, step: int = 1) -> int:
    """A multiple of ``step``, a power of two, that is not below a number; eight of them between two powers of two."""
    step = max(step, 1 << max(0, number.bit_length() - 4))
    return -(-number // step) * step


def targets_of(tokens: Tokens, rows: Sequence[int] | np.ndarray, coarse: bool = False) -> np.ndarray:
    """What some rows have to find: (rows, ...) or, where targets are sequences, (rows, width) padded by `IGNORED`.

    ``coarse``: see `width_of`.
    """
    if tokens.target_offsets is None:
        return np.asarray(tokens.targets[rows])
    all_lengths = np.diff(tokens.target_offsets)
    lengths = all_lengths[rows]
    mask = np.arange(width_of(lengths, coarse, int(all_lengths.max()))) < lengths[:, None]
    return _cells(tokens.targets, tokens.target_offsets, rows, mask, IGNORED)


def _cells(
    stream: np.ndarray, offsets: np.ndarray, rows: Sequence[int] | np.ndarray, mask: np.ndarray, fill: int
) -> np.ndarray:
    """The slices of ``rows`` as (rows, width) int64, ``fill`` where ``mask`` is false."""
    # Positions of every kept cell in the stream, row by row: one gather instead of a loop over rows.
    where = (np.asarray(offsets)[rows][:, None] + np.arange(mask.shape[1]))[mask]
    cells = np.full(mask.shape, fill, dtype=np.int64)
    cells[mask] = stream[where]
    return cells
