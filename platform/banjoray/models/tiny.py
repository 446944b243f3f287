"""Base models of a few hundred thousand random weights, made on this machine: a job is tried out with one in seconds.

The tokenizer learns from the texts that ship with banjoray and the weights are drawn from a fixed seed, so two machines
with the same libraries make the same model. One is made when it is first asked for, and kept:

<cache>/<key>/      a Hugging Face folder; the key is a digest of all that decides what is in it
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from banjoray.data.sources import SHIPPED
from banjoray.errors import ModelError

FORMAT = 1
SEED = 7
# Tokens of every vocabulary: 256 bytes, and the pieces of words that the shipped texts show most.
VOCABULARY = 2000
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# Of 64 numbers, with weights as small as BERT's own all texts would get the same answer to four digits.
SPREAD = 0.1


@dataclass(frozen=True)
class _Kind:
    """How a model is made: its config's class and keys, the class that has its head, and its tokenizer.

    ``tokens`` are the special ones by transformers' names, in the order of their ids; ``single`` and ``pair`` say where
    they stand around texts, empty: nowhere.
    """

    config: str
    head: str
    sizes: dict[str, Any]
    tokens: dict[str, str]
    single: str = ""
    pair: str = ""


_KINDS = {
    "tiny-bart": _Kind(
        "BartConfig",
        "AutoModelForSeq2SeqLM",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 512,
            "init_std": SPREAD,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
        {
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
        },
        "<s> $A </s>",
        "<s> $A </s> $B </s>",
    ),
    "tiny-bert": _Kind(
        "BertConfig",
        "AutoModelForMaskedLM",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "max_position_embeddings": 512,
            "initializer_range": SPREAD,
        },
        {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    "tiny-gpt2": _Kind(
        "GPT2Config",
        "AutoModelForCausalLM",
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": SPREAD},
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    ),
    "tiny-t5": _Kind(
        "T5Config",
        "AutoModelForSeq2SeqLM",
        {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "$A </s>",
        "$A </s> $B </s>",
    ),
}
NAMES = tuple(_KINDS)


def tiny_base(name: str, bases: Path | None = None) -> Path:
    """The folder of a tiny model, one of `NAMES`; made now if it is not there.

    It is complete or absent; processes that make the same one at once all succeed. ``bases`` is
    ``~/.cache/banjoray/bases`` if not given.
    """
    bases = bases or Path.home() / ".cache" / "banjoray" / "bases"
    entry = bases / f"{name}-{_key(_KINDS[name])}"
    if _whole(entry):
        return entry
    try:
        bases.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=bases))
    except OSError as error:
        raise ModelError(f"model.base: banjoray:{name} is made in {bases}, which can't be written ({error})") from None
    try:
        _make(_KINDS[name], staging / "made")
        if entry.is_dir() and not _whole(entry):
            # Part of one, after a cleaner of old files: out of the way, in one step.
            with suppress(OSError):
                entry.rename(staging / "part")
        try:
            (staging / "made").replace(entry)
        except OSError:
            # Somebody else was first: a folder with files in it can't be replaced, and theirs is equal.
            if not _whole(entry):
                raise
    finally:
        shutil.rmtree(staging)
    return entry


def _whole(entry: Path) -> bool:
    return all((entry / name).is_file() for name in FILES)


def _key(kind: _Kind) -> str:
    """A digest of what decides the files: the recipe, the texts, and the libraries that draw and write."""
    facts = {"format": FORMAT, "seed": SEED, "vocabulary": VOCABULARY, "kind": asdict(kind), "texts": _texts_digest()}
    facts |= {name: version(name) for name in ("tokenizers", "torch", "transformers")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _texts_digest() -> str:
    return hashlib.sha256("\n".join(_texts()).encode()).hexdigest()


def _texts() -> Iterator[str]:
    """Every text of the train rows that ship with banjoray, in a fixed order."""
    for file in sorted(SHIPPED.glob("*/train.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield from _strings(json.loads(line))


def _strings(cell: Any) -> Iterator[str]:
    """The texts in a cell; of a list of words, one with blanks between them."""
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, dict):
        for inner in cell.values():
            yield from _strings(inner)
    elif isinstance(cell, list):
        yield " ".join(word for word in cell if isinstance(word, str))


def _make(kind: _Kind, folder: Path) -> None:
    """Write model and tokenizer into ``folder``."""
    import torch
    import transformers

    tokenizer = _tokenizer(kind)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in kind.tokens.items()}
    known = ("pad_token_id", "bos_token_id", "eos_token_id")
    config = getattr(transformers, kind.config)(
        vocab_size=len(tokenizer), **kind.sizes, **{name: number for name, number in ids.items() if name in known}
    )
    # What a caller draws afterwards is what it would have drawn anyway.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = getattr(transformers, kind.head).from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(kind: _Kind) -> Any:
    """Byte-level BPE, in which every text has tokens of its own, between the special tokens of the kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys(kind.tokens.values()))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    # Of merges that are equally frequent, the one of the lower ids is taken: the same texts give the same merges.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_texts(), trainer)
    placed: Any = processors.ByteLevel(trim_offsets=True)
    if kind.single:
        ids = [(token, number) for number, token in enumerate(special) if token in kind.pair]
        template = processors.TemplateProcessing(single=kind.single, pair=kind.pair, special_tokens=ids)
        placed = processors.Sequence([placed, template])
    made.post_processor = placed
    segments = ["token_type_ids"] if ":1" in kind.pair else []
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_input_names=["input_ids", *segments, "attention_mask"], **kind.tokens
    )
