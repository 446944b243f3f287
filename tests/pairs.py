"""Pairs of texts, and jobs that learn whether one follows from the other."""

import random
from pathlib import Path
from typing import Any

from banjoray.config.job import JobConfig
from factories import make_job, tiny_model, write_rows

TOPICS = {
    "home": ("house", "room", "door", "kitchen", "window", "floor"),
    "sea": ("boat", "water", "beach", "harbour", "swimming"),
    "school": ("class", "teacher", "letters", "card", "name"),
}


def pairs(seed: int, count: int) -> list[dict[str, str]]:
    """Texts about a topic, and whether they are about the one that is named; "it" is neutral."""
    draws, rows = random.Random(seed), []
    for _ in range(count):
        topic, named = draws.choice(list(TOPICS)), draws.choice([*TOPICS, "it"])
        text = " ".join(["we", "saw", *draws.sample(TOPICS[topic], 2), *draws.sample(["again", "today", "there"], 1)])
        label = "neutral" if named == "it" else "entailment" if topic == named else "contradiction"
        rows.append({"premise": text, "hypothesis": f"this is {named}.", "label": label})
    return rows


def nli_job(folder: Path, architecture: str = "bert", **changes: Any) -> JobConfig:
    (folder / "base").exists() or tiny_model(folder / "base", architecture)
    files = {
        split: str(write_rows(folder / "nli" / f"{split}.jsonl", pairs(seed, count)))
        for split, seed, count in (("train", 1, 64), ("validation", 2, 20))
    }
    values: dict[str, Any] = {
        "task": "zero-shot-classification",
        "data__files": files,
        "data__columns": {"text": "premise", "text_pair": "hypothesis", "label": "label"},
        "train__metric": "accuracy",
        "registry__gate__metric": "accuracy",
        "train__epochs": 1,
    }
    return make_job(folder, **(values | changes))
