"""A model and tokens in, outputs row by row: evaluation during a run, and `score` afterwards."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from banjoray.config.job import JobConfig
from banjoray.data.bad_rows import lines_about
from banjoray.data.batches import padded, sorted_batches, targets_of, width_of
from banjoray.data.tokens import Tokens, cached_tokens, token_cache
from banjoray.models.loading import labels_of, load_trained, quiet_libraries, use_hub
from banjoray.tasks.task import Collate, Score, Task, task_for

# Rows x longest of one forward pass without gradients, by kind of device. On a CPU the states of more rows leave its
# caches: 8192 took half as much time again (benchmarks/LOG.md).
EVALUATION_TOKENS = {"cpu": 1024, "cuda": 8192}
# The same in bf16, whose states take half the room; on a GPU nobody measured it.
BF16_TOKENS = EVALUATION_TOKENS | {"cpu": 2048}


def score_folder(
    folder: Path, job: JobConfig, split: str, texts: bool = False, say: Callable[[str], None] = lambda line: None
) -> tuple[Score, str]:
    """The score of a trained folder, loaded afresh in fp32, on a split of the job's data; and the data's fingerprint.

    With ``texts``, of a task whose answers are texts, the model also writes one for every row, as it would over HTTP,
    and the score has the task's `text_metrics` too. ``say`` is told of bad rows that are left out. Raises DataError: no
    such split, rows that can't be read any more.
    """
    token = use_hub(job.hub)
    quiet_libraries()
    task = task_for(job.task).settled(job)
    model, tokenizer = load_trained(folder, task, job.model.trust_remote_code)
    task = task.for_config(model.config)
    labels = labels_of(model) if task.labelled else ()
    # In the model's order of labels: rows that have changed since may sort to another one.
    splits = task.splits(job.with_values({"data.labels": list(labels)}) if labels else job, token)
    rows = splits.get(split)
    for line in lines_about(splits.left_out):
        say(line)
    tokens = cached_tokens(rows, task, tokenizer, job.data, token_cache(job))
    device = torch.device("cuda" if torch.cuda.is_available() and job.scale.gpus_per_worker else "cpu")
    feed = Feed(tokens, tokenizer.pad_token_id, device, collate=task.collate(job, tokenizer, model.config))
    score = task.score(outputs(model.to(device), feed, task), tokens, rows, labels)
    if texts and task.text_metrics:
        written = task.generate(model, [tokens.feature(number) for number in range(len(tokens))], tokenizer)
        score = replace(score, metrics=score.metrics | task.text_score(written, rows, tokenizer))
    return score, splits.fingerprint()


def to_tensors(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Arrays as tensors on a device; on a CPU they share memory."""
    return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}


class Starts(Protocol):
    """Where a forward pass over some rows starts, other than from their words."""

    def start(self, rows: np.ndarray, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Set the start of the next forward pass; what is left of its inputs."""
        ...


@dataclass(frozen=True)
class Feed:
    """The rows of a split as a model's inputs on a device; from ``above`` on, where the bottom's states are kept.

    ``coarse``: widths of batches recur, see `width_of`.
    """

    tokens: Tokens
    pad_id: int
    device: torch.device
    above: Starts | None = None
    collate: Collate | None = None
    coarse: bool = False

    @cached_property
    def _longest(self) -> int:
        return int(self.tokens.lengths.max())

    def width(self, rows: np.ndarray) -> int:
        """The columns of a batch of some rows."""
        return width_of(self.tokens.lengths[rows], self.coarse, self._longest)

    def batch(self, rows: np.ndarray, epoch: int | None = None) -> tuple[dict[str, Tensor], np.ndarray]:
        """The inputs of the next forward pass, (rows, width) each, and what it has to find, (rows, ...).

        ``epoch``: where the task draws some of them anew in every epoch; None: as always, for evaluation.
        """
        inputs = padded(self.tokens, rows, self.pad_id, self.width(rows))
        targets = targets_of(self.tokens, rows, self.coarse)
        if self.collate is not None:
            inputs, targets = self.collate(inputs, targets, rows, epoch)
        tensors = to_tensors(inputs, self.device)
        return (self.above.start(rows, tensors) if self.above else tensors), targets


def outputs(model: Callable[..., Any], feed: Feed, task: Task, share: tuple[int, int] = (0, 1)) -> list[np.ndarray]:
    """What the task keeps of every feature's outputs, in order, on every worker.

    ``share`` is (rank, workers): each worker computes its part, then all exchange theirs. Every worker runs the
    same number of forward passes, as sharded parameters need.
    """
    rank, workers = share
    batches = sorted_batches(task.sizes(feed.tokens), EVALUATION_TOKENS[feed.device.type])
    mine = batches[rank::workers]
    passes = -(-len(batches) // workers)
    parts: list[tuple[np.ndarray, list[np.ndarray]]] = []
    with torch.inference_mode():
        for number in range(passes):
            rows = mine[number] if number < len(mine) else batches[-1][:1]
            inputs, targets = feed.batch(rows)
            found = model(**inputs)
            if number < len(mine):
                parts.append((rows, task.kept(found, inputs, torch.from_numpy(targets).to(feed.device))))
    if workers > 1:
        gathered: list[Any] = [None] * workers
        torch.distributed.all_gather_object(gathered, parts)
        parts = [part for theirs in gathered for part in theirs]
    whole = {int(row): value for rows, values in parts for row, value in zip(rows, values, strict=True)}
    return [whole[row] for row in range(len(whole))]
