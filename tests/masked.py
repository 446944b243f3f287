"""Tiny models with a head that fills masks, of every family that has one, and a tokenizer that cuts words in pieces."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from banjoray.config.job import JobConfig
from factories import DEPTH, make_job, sample_rows, write_rows

# Words of more letters are cut into pieces of so many.
PIECE = 4
# Rows of the sample that the tokenizer knows the words of, and that a job has.
ROWS = 40
FAMILIES = ("bert", "distilbert", "roberta", "albert", "electra", "deberta-v2", "modernbert")
# As the published models write it.
MASKS = {"roberta": "<mask>"}


def pieces_tokenizer(mask: str | None = "[MASK]") -> Any:
    """A lower-casing tokenizer of the sample's words in pieces of `PIECE` letters, the later ones with ``##``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *([mask] if mask else [])]
    cut = pre_tokenizers.Whitespace()
    words = {word for row in sample_rows("train")[:ROWS] for word, _ in cut.pre_tokenize_str(row["text"].lower())}
    pieces = {
        "##" * bool(start) + word[start : start + PIECE] for word in words for start in range(0, len(word), PIECE)
    }
    vocabulary = {piece: number for number, piece in enumerate([*special, *sorted(pieces)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = cut
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.decoder = decoders.WordPiece()
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"} | ({"mask": mask} if mask else {})
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    )


def masked_config(family: str, words: int, **changes: Any) -> Any:
    """The config of a model 32 wide, `DEPTH` blocks deep, with weights so large that every text gets its own answer."""
    import transformers

    usual: dict[str, Any] = {
        "vocab_size": words,
        "pad_token_id": 0,
        "hidden_size": 32,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 80,
        "initializer_range": 0.3,
    }
    kinds: Mapping[str, tuple[str, dict[str, Any]]] = {
        "bert": ("BertConfig", {}),
        "roberta": ("RobertaConfig", {}),
        "albert": ("AlbertConfig", {"embedding_size": 16}),
        "electra": ("ElectraConfig", {"embedding_size": 16}),
        "distilbert": ("DistilBertConfig", {"dim": 32, "n_layers": DEPTH, "n_heads": 2, "hidden_dim": 64}),
        "deberta-v2": (
            "DebertaV2Config",
            {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]},
        ),
        "modernbert": (
            "ModernBertConfig",
            {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3, "local_attention": 8},
        ),
    }
    name, own = kinds[family]
    if family == "distilbert":
        usual = {
            key: usual[key] for key in ("vocab_size", "pad_token_id", "max_position_embeddings", "initializer_range")
        }
    return getattr(transformers, name)(**usual | own | changes)


def masked_base(folder: Path, family: str = "bert", **changes: Any) -> Path:
    """A base model folder: random weights and `pieces_tokenizer`; ``changes`` to its config."""
    import torch
    from transformers import AutoModelForMaskedLM

    torch.manual_seed(7)
    tokenizer = pieces_tokenizer(MASKS.get(family, "[MASK]"))
    AutoModelForMaskedLM.from_config(masked_config(family, len(tokenizer), **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def masked_job(folder: Path, **changes: Any) -> JobConfig:
    """`factories.make_job` for fill-mask, on a base of `masked_base`: `ROWS` train and 12 validation rows."""
    if not (folder / "base").exists():
        masked_base(folder / "base")
    usual = {"train__metric": "perplexity", "train__mode": "min", "registry__gate__metric": "perplexity"}
    splits = {"train": sample_rows("train")[:ROWS], "validation": sample_rows("train")[ROWS - 12 : ROWS]}
    files = {split: str(write_rows(folder / f"{split}.jsonl", rows)) for split, rows in splits.items()}
    return make_job(folder, task="fill-mask", **usual | {"data__files": files} | changes)
