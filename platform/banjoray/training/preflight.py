"""A job checked from end to end before any worker starts: rows read, tokens made, base found, freezing possible."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from banjoray.config.job import JobConfig, is_url
from banjoray.data.bad_rows import lines_about
from banjoray.data.profile import Profile, profile
from banjoray.data.splits import Splits
from banjoray.data.tokens import cached_tokens, token_cache
from banjoray.errors import ConfigError
from banjoray.models.freezing import count_weights, freeze_parameters
from banjoray.models.loading import (
    Base,
    base_config,
    find_base,
    load_for_training,
    load_tokenizer,
    quiet_libraries,
    sketch,
    use_hub,
)
from banjoray.models.vocabulary import narrow
from banjoray.tasks.task import Task, check_metrics, task_for
from banjoray.training.compatibility import check, check_budget
from banjoray.training.interface import Rows, Start
from banjoray.training.objective import row_weights
from banjoray.training.tracking import check_trackers


@dataclass(frozen=True)
class Ready:
    """A job that can start: everything that a worker needs, and what the driver says about it.

    ``trainable`` and ``weights`` count numbers in the model; ``warnings`` are lines for the user.
    """

    task: Task
    splits: Splits
    base: Base
    rows: Rows
    start: Start
    trainable: int
    weights: int
    fingerprint: str
    warnings: tuple[str, ...]


def prepare(job: JobConfig) -> Ready:
    """Check a job and make its tokens; the driver does this first, each worker then finds the cache warm.

    Raises ConfigError, DataError or ModelError, whichever is found first; nothing has been started by then.
    """
    check(job)
    check_metrics(job)
    check_trackers(job.tracking)
    # Before anything imports huggingface_hub, which reads its settings at import.
    token = use_hub(job.hub)
    quiet_libraries()
    check_places(job)
    task = task_for(job.task).settled(job)
    splits = task.splits(job, token)
    base = find_base(job.model, job.hub)
    tokenizer = load_tokenizer(base)
    config = base_config(base, job, splits.labels, tokenizer.pad_token_id)
    # Here for its refusals; every worker makes its own.
    task.collate(job, tokenizer, config)
    _check_length(job, config)
    task.check(job, tokenizer, config)
    drawing = sketch(config, task, job.model.trust_remote_code)
    trainable, weights = shaped(job, drawing)
    cache = token_cache(job)
    train = cached_tokens(splits.train, task, tokenizer, job.data, cache)
    validation = cached_tokens(splits.validation, task, tokenizer, job.data, cache)
    row_weights(job, task, train, splits.labels)
    if job.train.checkpoint_budget_gib:
        # As the loop does: checkpoints hold the words in use alone.
        if task.steady:
            narrow(drawing, (part.streams["input_ids"] for part in (train, validation)))
        check_budget(job, count_weights(drawing)[0])

    def model(say: Callable[[str], None] = lambda line: None, /) -> Any:
        loaded = load_for_training(base, config, task, job.train.seed, say)
        shaped(job, loaded)
        return loaded

    return Ready(
        task=task,
        splits=splits,
        base=base,
        rows=Rows(train, validation, splits.labels, tokenizer.pad_token_id, splits.validation),
        start=Start(model, tokenizer),
        trainable=trainable,
        weights=weights,
        fingerprint=splits.fingerprint(),
        warnings=(
            *lines_about(splits.left_out),
            *(
                _cut_warning(job, name, tokens)
                for name, tokens in (("train", train), ("validation", validation))
                if tokens.cut
            ),
        ),
    )


def profiled(job: JobConfig) -> Profile:
    """What a job's rows are like; raises ConfigError, DataError or ModelError as `prepare` does."""
    token = use_hub(job.hub)
    quiet_libraries()
    task = task_for(job.task).settled(job)
    tokenizer = load_tokenizer(find_base(job.model, job.hub))
    return profile(task.splits(job, token), task, tokenizer, job.data)


def shaped(job: JobConfig, model: Any) -> tuple[int, int]:
    """Freeze, or put adapters in, as the job says; (trainable, all) as numbers of weights."""
    if job.adapter is None:
        return freeze_parameters(model, job.freeze)
    from banjoray.models.adapters import attach

    attach(model, job.adapter, job.freeze, job.train.seed)
    return count_weights(model)


def check_places(job: JobConfig) -> None:
    """Refuse a storage or registry that can't be written to, before hours of training end there."""
    for key, place in (("storage", job.storage), ("registry.root", job.registry.root)):
        try:
            fsspec.core.url_to_fs(place)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{key}: '{place}' is of no kind that fsspec can open here ({error})") from None
        if not is_url(place):
            standing = next(
                folder for folder in (Path(place).absolute(), *Path(place).absolute().parents) if folder.exists()
            )
            if not (standing.is_dir() and os.access(standing, os.W_OK)):
                raise ConfigError(f"{key}: '{place}' can't be made: {standing} is no folder that can be written to")


def _check_length(job: JobConfig, config: Any) -> None:
    """Refuse more tokens than the model has positions; it would fail inside an embedding lookup."""
    limit = getattr(config, "max_position_embeddings", None)
    # RoBERTa counts positions from padding_idx + 1: two of its 514 positions hold no token.
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    if limit and job.data.max_length > limit - offset:
        raise ConfigError(
            f"data.max_length: found {job.data.max_length}; {job.model.base} has {limit - offset} positions"
        )


def _cut_warning(job: JobConfig, split: str, tokens: Any) -> str:
    share = tokens.cut / len(tokens)
    target = f", or their targets than data.max_target_length {job.data.max_target_length}," * (
        task_for(job.task).generates and job.data.columns.target is not None
    )
    return (
        f"{split}: {tokens.cut} of {len(tokens)} texts ({share:.1%}) are longer than data.max_length "
        f"{job.data.max_length}{target} and are cut"
    )
