"""Tiny question-answering models, rows and jobs for tests."""

from pathlib import Path
from typing import Any

import numpy as np

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from factories import DEPTH, sample_rows, tiny_model, tiny_tokenizer, write_rows

LENGTH, STRIDE = 40, 8


def base(folder: Path, architecture: str, **changes: Any) -> Path:
    """A tiny base whose weights are large enough for unlike answers to unlike rows."""
    import torch
    import transformers

    usual: dict[str, Any] = {
        "vocab_size": len(tiny_tokenizer()),
        "pad_token_id": 0,
        "hidden_size": 32,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 80,
    }
    special: dict[str, Any] = {"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config: Any
    if architecture == "deberta-v2":
        relative: dict[str, Any] = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
        config = transformers.DebertaV2Config(**usual, **relative)
    elif architecture == "modernbert":
        config = transformers.ModernBertConfig(**usual, **special, local_attention=16)
    else:
        config = transformers.AutoConfig.from_pretrained(tiny_model(folder, architecture))
    for name, value in ({"initializer_range": 0.3} | changes).items():
        setattr(config, name, value)
    torch.manual_seed(7)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rows(count: int, seed: int, words: int = 60) -> list[dict[str, Any]]:
    """Questions about texts of up to ``words`` words, which may be more than a window holds; a word or two answers."""
    generator = np.random.default_rng(seed)
    texts = [row["text"].split() for row in sample_rows("train")]
    vocabulary = sorted({word for text in texts for word in text})
    found = []
    for number in range(count):
        told = generator.choice(vocabulary, generator.integers(8, words)).tolist()
        place = int(generator.integers(0, len(told) - 1))
        answer = " ".join(told[place : place + 1 + number % 2])
        start = len(" ".join([*told[:place], ""]))
        answers = {"text": [answer], "answer_start": [start]}
        question = " ".join(texts[number][:6])
        found.append({"question": question, "context": " ".join(told), "answers": answers})
    return found


def job_of(folder: Path, model: Path, train: list[Any], validation: list[Any], **changes: Any) -> JobConfig:
    """A job of one epoch in fp32, everything under ``folder``; ``changes`` as in `factories.make_job`."""
    files = {"train": train, "validation": validation}
    tree = {
        "name": "tiny",
        "task": "question-answering",
        "model": {"base": str(model), "dropout": 0.0},
        "data": {
            "files": {name: str(write_rows(folder / f"{name}.jsonl", rows)) for name, rows in files.items()},
            "max_length": LENGTH,
            "stride": STRIDE,
        },
        "train": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32"},
        "storage": str(folder / "runs"),
        "registry": {"root": str(folder / "registry")},
        "hub": {"offline": True},
    }
    job = validate(JobConfig, tree, "test job")
    return job.with_values({key.replace("__", "."): value for key, value in changes.items()})
