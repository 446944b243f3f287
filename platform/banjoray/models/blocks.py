"""The parts of a transformer from bottom to top: embeddings, then the stack of blocks, then the rest."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from banjoray.errors import ModelError


@dataclass(frozen=True)
class Blocks:
    """Where a base model can be cut.

    ``stack`` is the path of the list of blocks inside the base model (``encoder.layer``, ``h``, ``layers``);
    ``depth`` its length; ``shared`` says that its blocks serve several depths each (ALBERT), so that there is no cut
    between them; ``embeddings`` names the parameters below the first block, relative to the base model.
    """

    stack: str
    depth: int
    shared: bool
    embeddings: tuple[str, ...]


def find_blocks(model: Any) -> Blocks:
    """The blocks of a model, found by structure, since every family names them differently.

    The stack is the longest list of like modules outside a decoder (for an encoder-decoder: the encoder's).
    Raises ModelError: no such list.
    """
    from torch import nn

    base = model.base_model
    stacks = {
        path: module
        for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    }
    outer = {path: stack for path, stack in stacks.items() if not any(path.startswith(f"{p}.") for p in stacks)}
    if getattr(model.config, "is_encoder_decoder", False):
        outer = {path: stack for path, stack in outer.items() if not path.startswith("decoder.")} or outer
    declared = getattr(model.config, "num_hidden_layers", None)
    path, stack = max(outer.items(), key=lambda item: len(item[1]), default=("", []))
    if not path:
        raise ModelError(f"freeze: {type(base).__name__} has no list of blocks; use none, backbone or patterns")
    shared = isinstance(declared, int) and len(stack) < declared
    return Blocks(path, len(stack), shared, tuple(_embedding_parameters(base, path)))


def _embedding_parameters(base: Any, stack: str) -> Iterator[str]:
    """Parameters of every top-most module that holds an embedding table and not the stack."""
    from torch import nn

    def walk(module: Any, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if path == stack:
                continue
            if f"{stack}.".startswith(f"{path}."):
                yield from walk(child, f"{path}.")
            elif "embed" in name or any(isinstance(part, nn.Embedding) for part in child.modules()):
                yield from (f"{path}.{parameter}" for parameter, _ in child.named_parameters())

    return walk(base, "")
