"""What a model is made of, part by part, and what its tokenizer and its attention make of a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from banjoray.errors import ModelError
from banjoray.models.blocks import base_prefix, find_blocks

PARTS = ("embeddings", "encoder", "blocks", "decoder", "pooler", "other", "head")


@dataclass(frozen=True)
class Part:
    """A part of a model: how many numbers it has, and how many of those are trained."""

    name: str
    weights: int
    trained: int


@dataclass(frozen=True)
class Anatomy:
    """A model by parts, from bottom to top; weights that two parts share count in the lower one.

    The stack of blocks is called encoder where the model calls it so, else blocks; other is what stands beside all
    these, as a last norm.

    ``stack`` is the path of the list of blocks, ``depth`` how many there are, None where there is no such list;
    ``block`` the names of the parameters of one block with their shapes.
    """

    kind: str
    parts: tuple[Part, ...]
    stack: str | None
    depth: int | None
    block: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def weights(self) -> int:
        """All numbers of the model."""
        return sum(part.weights for part in self.parts)

    @property
    def trained(self) -> int:
        """Those that change in training."""
        return sum(part.trained for part in self.parts)


def anatomy(model: Any) -> Anatomy:
    """The parts of a model; one without memory behind its weights will do."""
    try:
        blocks = find_blocks(model)
    except ModelError:
        blocks = None
    base = base_prefix(model)
    embeddings = {f"{base}{name}" for name in blocks.embeddings} if blocks else set()
    stack = f"{base}{blocks.stack}." if blocks else ""
    sums = {name: [0, 0] for name in PARTS}
    for name, parameter in model.named_parameters():
        part = "embeddings" if name in embeddings else _part(name, base, stack)
        sums[part][0] += parameter.numel()
        sums[part][1] += parameter.numel() * parameter.requires_grad
    lowest = model.base_model.get_submodule(blocks.stack)[0] if blocks else None
    return Anatomy(
        type(model).__name__,
        tuple(Part(name, *counts) for name, counts in sums.items() if counts[0]),
        blocks.stack if blocks else None,
        blocks.depth if blocks else None,
        tuple((name, tuple(part.shape)) for name, part in lowest.named_parameters()) if lowest is not None else (),
    )


def _part(name: str, base: str, stack: str) -> str:
    if not name.startswith(base):
        return "head"
    if stack and name.startswith(stack):
        return "encoder" if "encoder" in stack else "blocks"
    inner = name.removeprefix(base)
    if inner.startswith("decoder."):
        return "decoder"
    return "pooler" if "pooler" in inner else "other"


@dataclass(frozen=True)
class TextTokens:
    """A text as a model sees it; all tuples have one entry per token, special tokens included.

    ``spans`` are the characters (start, end) that a token stands for; None for special ones and slow tokenizers.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    special: tuple[bool, ...]
    attended: tuple[bool, ...]
    types: tuple[int, ...]
    spans: tuple[tuple[int, int] | None, ...]
    unknown: int


def text_tokens(tokenizer: Any, text: str, text_pair: str | None = None) -> TextTokens:
    """The tokens of a text or pair, as training and serving cut it (but for the length)."""
    fast = bool(tokenizer.is_fast)
    encoded = tokenizer(text, text_pair, return_special_tokens_mask=True, return_offsets_mapping=fast)
    ids, special = encoded["input_ids"], [bool(flag) for flag in encoded["special_tokens_mask"]]
    spans = encoded["offset_mapping"] if fast else [None] * len(ids)
    return TextTokens(
        tuple(tokenizer.convert_ids_to_tokens(ids)),
        tuple(ids),
        tuple(special),
        tuple(bool(flag) for flag in encoded.get("attention_mask", [1] * len(ids))),
        tuple(encoded.get("token_type_ids", [0] * len(ids))),
        tuple(None if flag or span is None else (span[0], span[1]) for span, flag in zip(spans, special, strict=True)),
        sum(number == tokenizer.unk_token_id for number in ids) if tokenizer.unk_token_id is not None else 0,
    )


def attention_of(model: Any, found: TextTokens) -> np.ndarray:
    """How much every token looks at every other, (layers, heads, tokens, tokens): rows sum to one.

    ``model`` is loaded with ``attn_implementation="eager"``: other implementations never have these numbers.
    Raises ModelError: a model that gives no attention, or whose layers differ in heads.
    """
    import torch

    inputs = {"input_ids": torch.tensor([found.ids])}
    if "token_type_ids" in model.forward.__code__.co_varnames and any(found.types):
        inputs["token_type_ids"] = torch.tensor([found.types])
    with torch.inference_mode():
        layers: Sequence[Any] = model(**inputs, output_attentions=True).attentions or ()
    if not layers or any(layer is None for layer in layers):
        raise ModelError(f"--attention: {type(model).__name__} gives no attention")
    whole: np.ndarray = torch.stack([layer[0].float() for layer in layers]).cpu().numpy()
    return whole
