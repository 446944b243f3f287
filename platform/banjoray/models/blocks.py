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


def base_prefix(model: Any) -> str:
    """What the names of all parameters of the base model start with; empty where the model has no head."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def find_blocks(model: Any, key: str = "freeze", instead: str = "use none, backbone or patterns") -> Blocks:
    """The blocks of a model, found by structure, since every family names them differently.

    The stack is the longest list of like modules outside a decoder (for an encoder-decoder: the encoder's).
    Raises ModelError: no such list; ``key`` is the job's key that needs one, ``instead`` what to write there.
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
        raise ModelError(f"{key}: {type(base).__name__} has no list of blocks; {instead}")
    shared = isinstance(declared, int) and len(stack) < declared
    return Blocks(path, len(stack), shared, tuple(_embedding_parameters(base, path)))


def heights(model: Any) -> dict[str, int]:
    """Parameter name -> how many blocks lie between it and the top, its own block included.

    0: the head and what comes after the stack (a pooler, a last norm); 1: the top block; depth: the lowest block;
    depth + 1: the embeddings. Adapter parameters have the height of the block that they are in. Blocks that serve
    several depths each (ALBERT) have no order: all of them are at 1, the embeddings at 2. In an encoder-decoder the
    encoder is the stack, and all of the decoder is at 0.
    Raises ModelError: no list of blocks.
    """
    blocks = find_blocks(model, "train.layerwise_lr_decay", "use 1.0")
    base = base_prefix(model)
    embeddings = {f"{base}{name}" for name in blocks.embeddings}
    stack = f"{base}{blocks.stack}."
    depth = 1 if blocks.shared else blocks.depth

    def height(name: str) -> int:
        if name in embeddings:
            return depth + 1
        if not name.startswith(stack):
            return 0
        return 1 if blocks.shared else depth - int(name.removeprefix(stack).partition(".")[0])

    return {name: height(name) for name, _ in model.named_parameters()}


def probe_of(model: Any) -> dict[str, Any]:
    """Inputs to try a model with: two rows of unlike lengths, whose positions differ from each other."""
    import torch

    device = next(model.parameters()).device
    ids = torch.arange(2 * 6, device=device).reshape(2, 6) % model.config.vocab_size
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _embedding_parameters(base: Any, stack: str) -> Iterator[str]:
    """Parameters of every top-most module that holds an embedding table and neither the stack nor a decoder."""
    from torch import nn

    def walk(module: Any, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if path == stack or (path == "decoder" and not f"{stack}.".startswith("decoder.")):
                continue
            if f"{stack}.".startswith(f"{path}."):
                yield from walk(child, f"{path}.")
            elif "embed" in name or any(isinstance(part, nn.Embedding) for part in child.modules()):
                yield from (f"{path}.{parameter}" for parameter, _ in child.named_parameters())

    return walk(base, "")
