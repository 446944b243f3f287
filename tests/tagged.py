"""Tiny tokenizers of three kinds that mark words differently, models over them, and sentences with named entities."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from factories import write_rows

# Which kind of tokenizer the models of a family come with; "types": it says to which text of a pair a token belongs.
KINDS = {
    "bert": "wordpiece types",
    "distilbert": "wordpiece",
    "electra": "wordpiece types",
    "roberta": "bytes",
    "modernbert": "bytes",
    "albert": "pieces types",
    "deberta-v2": "pieces types",
}
SPECIAL = ("<pad>", "<unk>", "<cls>", "<sep>")
FIRST = ("Ada", "Bo", "Cleo", "Dag", "Emi", "Faraz")
LAST = ("Lund", "Okafor", "Pires", "Quist", "Rao")
CITIES = ("Oslo", "Lima", "Pune", "Kyoto", "Accra", "New Ulm")
VERBS = ("meets", "calls", "visits", "sees", "isn't with")


@cache
def sentences(count: int, seed: int = 3) -> tuple[dict[str, Any], ...]:
    """Rows of words and tags: people who meet in places."""
    generator = np.random.default_rng(seed)

    def one(names: tuple[str, ...]) -> str:
        return names[generator.integers(len(names))]

    def tagged(name: str, kind: str) -> list[tuple[str, str]]:
        return [(word, f"{'I' if at else 'B'}-{kind}") for at, word in enumerate(name.split())]

    def plain(text: str) -> list[tuple[str, str]]:
        return [(word, "O") for word in text.split()]

    rows = []
    for _ in range(count):
        pairs = [*tagged(f"{one(FIRST)} {one(LAST)}", "PER"), *plain(one(VERBS)), *tagged(one(FIRST), "PER")]
        if generator.random() < 0.6:
            pairs += [*plain("in"), *tagged(one(CITIES), "LOC")]
        pairs += plain(one((".", "today .", "and Ada's friend !")))
        rows.append({"tokens": [word for word, _ in pairs], "tags": [tag for _, tag in pairs]})
    return tuple(rows)


@cache
def _tokenizer(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    texts = [" ".join(row["tokens"]) for row in sentences(300)]
    made: Any
    trainer: Any
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token=SPECIAL[1]))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=70, special_tokens=list(SPECIAL), show_progress=False)
    elif kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
        )
    else:
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=80, special_tokens=list(SPECIAL), unk_token=SPECIAL[1], show_progress=False
        )
    made.train_from_iterator(texts, trainer)
    ends = (SPECIAL[3], 3), (SPECIAL[2], 2)
    made.post_processor = (
        processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)
        if kind == "bytes"
        else processors.BertProcessing(*ends)
    )
    return made


def tokenizer_of(architecture: str) -> Any:
    """A fast tokenizer as models of that family have it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    kind, _, types = KINDS[architecture].partition(" ")
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    pad, unknown, first, last = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer(kind).to_str()),
        pad_token=pad,
        unk_token=unknown,
        cls_token=first,
        sep_token=last,
        model_input_names=names,
    )


def tagging_base(folder: Path, architecture: str) -> Path:
    """A base model folder: random weights that are large enough to tell tokens apart, 32 wide, two blocks."""
    import torch
    import transformers

    tokenizer = tokenizer_of(architecture)
    size: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "initializer_range": 0.2}
    usual = size | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    usual |= {"max_position_embeddings": 80}
    configs: dict[str, Any] = {
        "bert": lambda: transformers.BertConfig(**usual),
        "electra": lambda: transformers.ElectraConfig(**usual, embedding_size=16),
        "roberta": lambda: transformers.RobertaConfig(**usual),
        "albert": lambda: transformers.AlbertConfig(**usual, embedding_size=16),
        "distilbert": lambda: transformers.DistilBertConfig(
            **size, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=80
        ),
        "deberta-v2": lambda: transformers.DebertaV2Config(
            **usual, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0
        ),
        "modernbert": lambda: transformers.ModernBertConfig(
            **usual, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3, local_attention=16
        ),
    }
    torch.manual_seed(11)
    transformers.AutoModel.from_config(configs[architecture]()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tagging_job(folder: Path, architecture: str = "bert", **changes: Any) -> JobConfig:
    """A job on 64 train and 24 validation sentences; ``changes`` are dotted keys with ``__`` for the dot."""
    base = folder / f"base-{architecture}"
    if not base.exists():
        tagging_base(base, architecture)
    files = {
        "train": str(write_rows(folder / "data/train.jsonl", sentences(64))),
        "validation": str(write_rows(folder / "data/validation.jsonl", sentences(24, seed=4))),
    }
    tree = {
        "name": "tagger",
        "task": "token-classification",
        "model": {"base": str(base), "dropout": 0.0},
        "data": {"files": files, "max_length": 48, "stride": 12},
        "train": {"epochs": 1, "batch_size": 8, "learning_rate": 3e-3, "precision": "fp32"},
        "storage": str(folder / "runs"),
        "registry": {"root": str(folder / "registry")},
        "hub": {"offline": True},
    }
    job = validate(JobConfig, tree, "test job")
    return job.with_values({key.replace("__", "."): value for key, value in changes.items()})
