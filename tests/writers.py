"""Tiny models that write, their tokenizers and rows: built here in milliseconds, nothing is downloaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from factories import write_rows

WORDS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "funf", "six": "sechs"}
ENCODER_DECODERS = ("t5", "bart", "mbart", "marian")
DECODERS = ("gpt2", "llama")
# Where [PAD], [UNK], <s> and </s> stand in the vocabulary of `words_tokenizer`.
PAD, BEGIN, END = 0, 2, 3


def phrases(count: int, longest: int = 4) -> list[dict[str, Any]]:
    """Rows of one to ``longest`` number words, and the same in German, also as a nested column."""
    words = list(WORDS)
    rows = []
    for number in range(count):
        chosen = [words[(number * 7 + place * (1 + number % 5)) % len(words)] for place in range(1 + number % longest)]
        text, target = " ".join(chosen), " ".join(WORDS[word] for word in chosen)
        rows.append({"text": text, "target": target, "translation": {"en": text, "de": target}})
    return rows


def words_tokenizer(single: str = "$A </s>", pads: bool = True) -> Any:
    """A word tokenizer over `phrases` that ends every text, or as the template ``single`` says.

    Without ``pads`` it has no token for padding, as GPT-2's.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "<s>", "</s>", *WORDS, *WORDS.values(), "count:", ".", "and"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]" if pads else None,
        unk_token="[UNK]",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def bytes_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> Any:
    """A tokenizer whose tokens are bytes, and </s>; ``merges`` are pairs of byte-level letters (a line break is Ċ)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def language_tokenizer(kind: str) -> Any:
    """A tokenizer that is told its languages: ``mbart`` puts them last, ``mbart50`` and ``nllb`` first."""
    from transformers import MBart50Tokenizer, MBartTokenizer, NllbTokenizer

    words = [f"▁{word}" for word in (*WORDS, *WORDS.values())]
    if kind == "nllb":
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        # Pieces that merge letter by letter would be many; whole words are tokens of their own.
        made = NllbTokenizer(vocab={word: number for number, word in enumerate(special)})
        made.add_tokens([word.removeprefix("▁") for word in words])
        return made
    codes = MBartTokenizer().lang_code_to_id if kind == "mbart" else MBart50Tokenizer().lang_code_to_id
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(code, 0.0) for code in codes] + [(word, -1.0) for word in words] + [("<mask>", 0.0)]
    return (MBartTokenizer if kind == "mbart" else MBart50Tokenizer)(vocab=pieces)


def writer(folder: Path, architecture: str, tokenizer: Any = None, **changes: Any) -> Path:
    """A base model folder: random weights, 32 wide, two blocks; ``changes`` are keys of its config."""
    import torch
    import transformers

    torch.manual_seed(11)
    if tokenizer is None:
        tokenizer = words_tokenizer("$A" if architecture in DECODERS else "$A </s>", pads=architecture != "gpt2")
    loader: Any = transformers.AutoModelForCausalLM if architecture in DECODERS else transformers.AutoModelForSeq2SeqLM
    loader.from_config(_config(architecture, tokenizer, changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(architecture: str, tokenizer: Any, changes: dict[str, Any]) -> Any:
    import transformers

    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    usual: dict[str, Any] = ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    encoder: dict[str, Any] = usual | {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
    encoder |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "forced_eos_token_id": None}
    encoder |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": tokenizer.eos_token_id}
    match architecture:
        case "t5":
            sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
            start = {"vocab_size": len(tokenizer), "decoder_start_token_id": tokenizer.pad_token_id}
            return transformers.T5Config(**(ids | sizes | start | changes))
        case "bart":
            return transformers.BartConfig(**(encoder | changes))
        case "mbart":
            return transformers.MBartConfig(**(encoder | changes))
        case "marian":
            start = {"decoder_start_token_id": tokenizer.pad_token_id, "decoder_vocab_size": len(tokenizer)}
            return transformers.MarianConfig(**(encoder | start | changes))
        case "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
            return transformers.GPT2Config(**(ids | sizes | {"vocab_size": len(tokenizer)} | changes))
        case "llama":
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            return transformers.LlamaConfig(**(usual | sizes | {"num_key_value_heads": 1} | changes))
    raise AssertionError(f"no tiny {architecture}")


def writing_job(
    folder: Path, task: str, architecture: str, tokenizer: Any = None, rows: Any = None, **changes: Any
) -> JobConfig:
    """A job on 48 train and 12 validation `phrases`; ``changes`` are dotted keys with ``__`` for the dot.

    ``rows``: other rows, the last 12 of which are for validation.
    """
    base = folder / "base"
    if not base.exists():
        writer(base, architecture, tokenizer)
    rows = phrases(60) if rows is None else rows
    files = {
        split: str(write_rows(folder / "data" / f"{split}.jsonl", part))
        for split, part in (("train", rows[:-12]), ("validation", rows[-12:]))
    }
    tree = {
        "name": "tiny",
        "task": task,
        "model": {"base": str(base), "dropout": 0.0},
        "data": {
            "files": files,
            "max_length": 16,
            "max_target_length": 12,
            "columns": {"text": "text", "target": "target"},
        },
        "train": {"epochs": 1, "batch_size": 16, "learning_rate": 3e-3, "adam_epsilon": 1e-5, "precision": "fp32"},
        "generation": {"max_new_tokens": 6},
        "storage": str(folder / "runs"),
        "registry": {"root": str(folder / "registry")},
        "hub": {"offline": True},
    }
    job = validate(JobConfig, tree, "test job")
    return job.with_values({key.replace("__", "."): value for key, value in changes.items()})
