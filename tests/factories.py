"""Tiny models, rows and jobs for tests: built here in milliseconds, nothing is downloaded."""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from banjoray.config.job import JobConfig
from banjoray.config.section import validate

SAMPLES = Path(__file__).parents[1] / "platform/banjoray/data/samples/emotion"
DEPTH = 3
ARCHITECTURES = ("bert", "distilbert", "roberta", "electra", "gpt2", "albert")


@cache
def sample_rows(split: str) -> tuple[dict[str, str], ...]:
    """The rows of the emotion set that ships with the project."""
    lines = (SAMPLES / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_model(folder: Path, architecture: str = "bert") -> Path:
    """A base model folder: random weights, 32 wide, `DEPTH` blocks, a word tokenizer over the sample's words."""
    import torch
    from transformers import AutoModel

    torch.manual_seed(7)
    tokenizer = tiny_tokenizer()
    AutoModel.from_config(_config(architecture, len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer() -> Any:
    """A lower-casing word tokenizer that marks pairs as BERT does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces = pre_tokenizers.Whitespace()
    words = {word for row in sample_rows("train") for word, _ in pieces.pre_tokenize_str(row["text"].lower())}
    vocabulary = {word: number for number, word in enumerate([*special, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pieces
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
    )


def _config(architecture: str, vocabulary: int) -> Any:
    import transformers

    common: dict[str, Any] = {"vocab_size": vocabulary, "pad_token_id": 0}
    usual: dict[str, Any] = common | {
        "hidden_size": 32,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 80,
    }
    match architecture:
        case "bert":
            return transformers.BertConfig(**usual)
        case "roberta":
            return transformers.RobertaConfig(**usual)
        case "electra":
            return transformers.ElectraConfig(**usual, embedding_size=16)
        case "albert":
            return transformers.AlbertConfig(**usual, embedding_size=16)
        case "distilbert":
            return transformers.DistilBertConfig(
                **common, dim=32, n_layers=DEPTH, n_heads=2, hidden_dim=64, max_position_embeddings=80
            )
        case "modernbert":
            ids: dict[str, Any] = {"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
            return transformers.ModernBertConfig(**usual, **ids, local_attention=8)
        case "gpt2":
            return transformers.GPT2Config(**common, n_embd=32, n_layer=DEPTH, n_head=2, n_positions=80)
    raise AssertionError(f"no tiny {architecture}")


def make_job(folder: Path, **changes: Any) -> JobConfig:
    """A job on 96 train, 30 validation and 30 test rows with a tiny BERT, everything under ``folder``.

    ``changes`` are dotted keys with ``__`` for the dot: ``train__epochs=1``.
    """
    model = folder / "base"
    if not model.exists():
        tiny_model(model)
    files = {
        split: str(write_rows(folder / "data" / f"{split}.jsonl", sample_rows(split)[:count]))
        for split, count in (("train", 96), ("validation", 30), ("test", 30))
    }
    tree = {
        "name": "tiny",
        "task": "text-classification",
        "model": {"base": str(model), "dropout": 0.0},
        "data": {"files": files, "max_length": 40},
        "train": {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "adam_epsilon": 1e-5, "precision": "fp32"},
        "storage": str(folder / "runs"),
        "registry": {"root": str(folder / "registry")},
        "hub": {"offline": True},
    }
    job = validate(JobConfig, tree, "test job")
    return job.with_values({key.replace("__", "."): value for key, value in changes.items()})
