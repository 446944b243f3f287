"""A word table cut down to the rows that the data uses.

A row of the table whose token is in no text gets no gradient, so AdamW moves it by weight decay alone: after some
steps it is its first value times a number. Leaving such rows out changes no other weight, and saves their gradients,
moments, clipping, exchange between workers and checkpoints: half of MiniLM's weights, two thirds of XLM-R base's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Above this share of used rows the cut saves too little to be worth a lookup.
LARGEST_SHARE = 0.8


@dataclass(frozen=True)
class Vocabulary:
    """What was cut out of a table: ``name`` is its parameter, ``rows`` (used,) int64 the rows that are left, rising.

    ``table`` (tokens, width) holds every row as it was before training.
    """

    name: str
    rows: Tensor
    table: Tensor

    def whole(self, used: Tensor, decay: float) -> Tensor:
        """The whole table, given the trained rows, and by what number weight decay multiplied the others."""
        table = self.table * decay
        table[self.rows] = used.to(table)
        return table


def narrow(model: Any, streams: Iterable[np.ndarray]) -> Vocabulary | None:
    """Cut the word table of ``model`` down to the token ids in ``streams``, in place; None where nothing was cut.

    It is left as it is where it is frozen, shared with an output layer (every row gets gradients there), or where
    most of it is used.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, torch.nn.Embedding) or not embedding.weight.requires_grad:
        return None
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        return None
    names = [name for name, found in model.named_parameters(remove_duplicate=False) if found is embedding.weight]
    used = np.unique(np.concatenate([np.unique(stream) for stream in streams]))
    if embedding.padding_idx is not None:
        used = np.union1d(used, [embedding.padding_idx])
    if len(names) != 1 or len(used) > LARGEST_SHARE * embedding.num_embeddings:
        return None
    vocabulary = Vocabulary(names[0], torch.from_numpy(used.astype(np.int64)), embedding.weight.detach())
    places = torch.zeros(embedding.num_embeddings, dtype=torch.int64)
    places[vocabulary.rows] = torch.arange(len(used))
    embedding.weight = torch.nn.Parameter(vocabulary.table[vocabulary.rows])
    embedding.num_embeddings = len(used)
    if embedding.padding_idx is not None:
        embedding.padding_idx = int(places[embedding.padding_idx])
    embedding.register_forward_pre_hook(_Places(places))
    return vocabulary


class _Places:
    """Turns token ids into rows of the table that is left, on whatever device they are."""

    def __init__(self, places: Tensor) -> None:
        self._places = places

    def __call__(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._places.device != inputs[0].device:
            self._places = self._places.to(inputs[0].device)
        return (self._places[inputs[0]], *inputs[1:])
