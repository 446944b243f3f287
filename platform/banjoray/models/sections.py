"""A model in sections, from bottom to top: what each gives is named by the weights that it is computed of.

So models that began as the same base, and were trained above some block only, show how far up they are still the same,
whatever their jobs said.
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from banjoray.errors import ModelError
from banjoray.models.blocks import find_blocks, probe_of
from banjoray.models.prefix import Cut, config_digest, trimmed


class Sections:
    """A model that can be run from any block to any other; raises ModelError: one that can't be cut between blocks.

    Has modules of its own and the model's tensors, so that the model itself may run beside it. One thread at a time.

    ``marks[k - 1]`` is a digest of all that the states above the lowest ``k`` blocks are computed of: the config and
    the weights, whose own ``digests`` are by their ids. Two models with equal marks give equal states for equal inputs.
    """

    def __init__(self, model: Any, digests: Mapping[int, str]) -> None:
        blocks = find_blocks(model)
        if blocks.shared or getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(f"{type(model).__name__} has no cut between its blocks")
        tensors = (*model.parameters(), *model.buffers())
        self._model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        for weight in model.parameters():
            # A fixed table of positions is a weight as well, and the graph of gradients would not have it.
            weight.requires_grad_(weight.is_floating_point())
        self._cuts = [Cut(self._model, depth) for depth in range(blocks.depth + 1)]
        if not all(cut.agrees() for cut in self._cuts[1:]):
            raise ModelError(f"{type(model).__name__} gives other outputs when it is cut between its blocks")
        self.marks = tuple(self._marks(digests))

    def up(self, inputs: dict[str, Tensor], states: Tensor | None, start: int, end: int) -> Tensor:
        """The states above ``end`` blocks, (rows, tokens, width), of those above ``start``; None: of the words.

        (rows, 1, width) above all blocks, where the head reads the first position alone.
        """
        with self._from(start, states):
            return self._cuts[end].below(inputs)

    def top(self, inputs: dict[str, Tensor], states: Tensor, start: int) -> Any:
        """The model's outputs, of the states above ``start`` blocks."""
        with self._from(start, states):
            return self._model(**trimmed(inputs, states.shape[1]))

    @contextmanager
    def _from(self, start: int, states: Tensor | None) -> Iterator[None]:
        if states is None:
            yield
            return
        cut = self._cuts[start]
        cut.states = states
        cut.start_above()
        try:
            yield
        finally:
            cut.restore()

    def _marks(self, digests: Mapping[int, str]) -> Iterator[str]:
        base, top = self._model.base_model, self._cuts[-1]
        named = {id(parameter): name for name, parameter in base.named_parameters()}
        whole = f"{type(base).__name__} {config_digest(self._model.config)}"
        for cut in self._cuts[1:]:
            used = sorted(f"{named[id(weight)]} {digests[id(weight)]}" for weight in _weights_of(cut, self._model))
            first_only = cut is top and cut.gives_first_only()
            yield hashlib.sha256("\n".join([whole, *used, "first only" * first_only]).encode()).hexdigest()


def held_once(model: nn.Module, known: MutableMapping[str, nn.Parameter]) -> dict[int, str]:
    """Have a model use the weights that are ``known`` by their digests where its own are equal; learn its others.

    Gives the digest of every weight that the model has now, by the weight's id.
    """
    digests = {id(parameter): tensor_digest(parameter) for parameter in model.parameters()}
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            digest = digests[id(parameter)]
            kept = known.setdefault(digest, parameter)
            digests[id(kept)] = digest
            setattr(module, name, kept)
    return digests


def tensor_digest(tensor: Tensor) -> str:
    """sha256 over a tensor's kind, place, shape and bytes."""
    cells = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{tensor.dtype} {tensor.device} {tuple(tensor.shape)} ".encode())
    found.update(cells.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _weights_of(cut: Cut, model: Any) -> Iterator[Any]:
    """The parameters that states below a cut are computed of, as the graph of gradients has them.

    By their names it could not be told: what stands beside the stack may be its input (ELECTRA's projection), a part of
    every block (DeBERTa's norm of positions), or come after it (a pooler).
    """
    with torch.enable_grad():
        left, seen = [cut.below(probe_of(model)).grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        left.extend(before for before, _ in node.next_functions)
