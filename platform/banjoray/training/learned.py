"""What a run changes of its base model: the part that checkpoints hold, and the proof that the rest did not move."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from banjoray.errors import TrainingFailed
from banjoray.models.blocks import base_prefix
from banjoray.models.vocabulary import Vocabulary

# Name, in the file of weights, of the rows that are left of a word table.
ROWS = "banjoray.vocabulary_rows"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Learned:
    """Names of a model's weights: ``kept`` in checkpoints, and ``frozen`` as the base model has them.

    The head is always kept: no base model holds it. Buffers that are saved with a model are kept too.
    """

    kept: tuple[str, ...]
    frozen: tuple[str, ...]
    vocabulary: Vocabulary | None

    @classmethod
    def of(cls, model: Any, vocabulary: Vocabulary | None) -> "Learned":
        """Of a model whose freezing and adapters are in place."""
        inside = base_prefix(model)
        frozen: list[str] = []
        kept: list[str] = []
        for name, parameter in model.named_parameters():
            (kept if parameter.requires_grad or not name.startswith(inside) else frozen).append(name)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        buffers = [name for name in model.state_dict() if name not in parameters]
        return cls((*kept, *buffers), tuple(frozen), vocabulary)

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write the kept weights, given whole."""
        from safetensors.torch import save_file

        rows = {ROWS: self.vocabulary.rows} if self.vocabulary else {}
        save_file({name: tensor.contiguous() for name, tensor in weights.items()} | rows, folder / WEIGHTS)


def load(model: Any, folder: Path, vocabulary: Vocabulary | None, decay: float) -> None:
    """Put a checkpoint's weights into a model made as training makes it.

    ``vocabulary`` is what was cut out of the model (None: it is whole, and so will its word table be);
    ``decay`` what weight decay multiplied the other rows by. Raises TrainingFailed: other weights, other rows.
    """
    from safetensors.torch import load_file

    saved = load_file(folder / WEIGHTS)
    rows = saved.pop(ROWS, None)
    if vocabulary is None and rows is not None:
        table = model.get_input_embeddings().weight
        (name,) = [name for name, parameter in model.named_parameters() if parameter is table]
        saved[name] = Vocabulary(name, rows, table.detach()).whole(saved[name], decay)
    elif vocabulary is not None and (rows is None or not torch.equal(rows, vocabulary.rows)):
        raise TrainingFailed(f"{folder}: the checkpoint is of other rows: their words are not those of this data")
    found = model.load_state_dict(saved, strict=False)
    missing = set(Learned.of(model, vocabulary).kept) & set(found.missing_keys)
    if found.unexpected_keys or missing:
        other = (*found.unexpected_keys, *sorted(missing))[0]
        raise TrainingFailed(f"{folder}: the checkpoint is of another model or freezing ('{other}' is not in both)")


def digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 over weights, by name."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(f"{name} {tuple(weights[name].shape)}".encode())
        found.update(weights[name].contiguous().numpy().data)
    return found.hexdigest()
