"""Texts about several topics or none, and jobs that find which ones, or a number that follows from them."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from banjoray.config.job import JobConfig
from factories import make_job, tiny_model, write_rows
from pairs import TOPICS

FAMILIES = ("bert", "distilbert", "roberta", "electra", "albert", "modernbert", "gpt2")
COUNTS = {"train": 96, "validation": 40, "test": 30}


def rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Texts with words of some topics, the topics as ``labels``, and a number ``score`` that follows from them."""
    draws, found = random.Random(seed), []
    for _ in range(count):
        topics = sorted(topic for topic in TOPICS if draws.random() < 0.4)
        words = [word for topic in topics for word in draws.sample(TOPICS[topic], 2)]
        text = " ".join(["we", "saw", *draws.sample(words, len(words)), *draws.sample(["again", "today", "there"], 1)])
        number = 1.5 * ("home" in topics) - 2 * ("sea" in topics) + 0.25
        found.append({"text": text, "labels": topics, "score": number})
    return found


TEXTS = tuple(row["text"] for row in rows(9, 12))


def files_of(folder: Path, counts: Mapping[str, int]) -> dict[str, str]:
    """Data files of so many `rows` each."""
    return {
        split: str(write_rows(folder / "topics" / f"{split}.jsonl", rows(seed, count)))
        for seed, (split, count) in enumerate(counts.items(), start=1)
    }


def problem_job(folder: Path, problem: str, architecture: str = "bert", **changes: Any) -> JobConfig:
    """`factories.make_job` on `rows`, for ``multi_label`` or ``regression``; learns what there is to learn."""
    (folder / "base").exists() or tiny_model(folder / "base", architecture)
    metric = {"multi_label": "f1_macro", "regression": "pearson"}[problem]
    values: dict[str, Any] = {
        "classification": {"problem_type": problem},
        "data__files": files_of(folder, COUNTS),
        "data__columns": {"label": {"multi_label": "labels", "regression": "score"}[problem]},
        "train__metric": metric,
        "registry__gate__metric": metric,
        "registry__gate__at_least": -1,
        "train__learning_rate": 3e-3,
        "train__batch_size": 8,
    }
    return make_job(folder, **(values | changes))
