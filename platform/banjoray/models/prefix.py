"""A model cut above its frozen bottom: what that part gives for a row never changes, so it is computed once.

The bottom is the embeddings and the lowest blocks, all frozen. It runs without dropout, also where nothing is kept:
that is what makes it a constant, and a run with a cache the same as one without.
"""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from banjoray.errors import ModelError
from banjoray.models.blocks import find_blocks, probe_of

# Parts of a config that change nothing below a head.
ASIDE = (
    "dropout",
    "pdrop",
    "label",
    "name_or_path",
    "architectures",
    "version",
    "dtype",
    "problem_type",
    "use_cache",
    "thresholds",
)


def frozen_depth(model: Any) -> int | None:
    """How many of the lowest blocks are frozen; None if the embeddings are not, or there is no cut between blocks.

    0 if the embeddings alone are frozen. Encoder-decoders have none: their decoder reads the embeddings again.
    """
    try:
        blocks = find_blocks(model)
    except ModelError:
        return None
    if blocks.shared or getattr(model.config, "is_encoder_decoder", False):
        return None
    base = model.base_model
    learns = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    if learns & set(blocks.embeddings):
        return None
    stack = base.get_submodule(blocks.stack)
    free = (number for number, block in enumerate(stack) if any(p.requires_grad for p in block.parameters()))
    return next(free, len(stack))


def config_digest(config: Any) -> str:
    """sha256 of the parts of a config that change what is computed below a head."""
    parts = {
        key: value
        for key, value in config.to_dict().items()
        if not any(aside in key for aside in ASIDE) and not key.startswith("_")
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def silence(model: Any, depth: int) -> None:
    """Take the dropout out of the bottom: of what comes before the blocks, and of the lowest ``depth`` of them."""
    base = model.base_model
    path = find_blocks(model).stack
    below = tuple(f"{path}.{number}." for number in range(depth))
    for name, module in base.named_modules():
        if name == path:
            break
        _quiet(module)
    for name, module in base.named_modules():
        if name.startswith(below):
            _quiet(module)


def _quiet(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.p = 0.0


class _Reached(Exception):
    """A forward pass has come to the cut."""

    def __init__(self, states: Any) -> None:
        super().__init__()
        self.states = states


class Cut:
    """A model and the number of blocks below the cut in it.

    `below` computes what the bottom gives; after `start_above` the model takes it from `states` instead: the blocks
    below are passed by. `restore` undoes that.
    """

    def __init__(self, model: Any, depth: int) -> None:
        self._model, self.depth = model, depth
        blocks = find_blocks(model)
        self._blocks = list(model.base_model.get_submodule(blocks.stack))
        # Where one module holds all that is below the blocks, as BERT's does, it is passed by too.
        below = getattr(model.base_model, "embeddings", None) if depth else None
        held = () if below is None else tuple(f"embeddings.{name}" for name, _ in below.named_parameters())
        self._embeddings: Any = below if held == blocks.embeddings else None
        self._hook: Any = None
        # (rows, tokens, width): what the next forward pass starts from.
        self.states: Tensor | None = None

    def below(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the bottom gives for some rows, (rows, tokens, width); (rows, 1, width) where the top block is cut.

        The mode and the precision are the caller's.
        """
        hook: Any

        def into(module: Any, given: tuple[Any, ...]) -> None:  # noqa: ARG001
            raise _Reached(given[0])

        def out_of(module: Any, given: Any, states: Any) -> None:  # noqa: ARG001
            raise _Reached(states)

        if self.depth == 0:
            hook = self._blocks[0].register_forward_pre_hook(into)
        else:
            hook = self._blocks[self.depth - 1].register_forward_hook(out_of)
        try:
            self._model.base_model(**inputs)
        except _Reached as reached:
            states = reached.states
            if isinstance(states, Tensor):
                return states
            raise ModelError(f"freeze: blocks of {type(self._model).__name__} give more than states") from None
        finally:
            hook.remove()
        raise ModelError(f"freeze: {type(self._model).__name__} never runs its block {self.depth - 1}")

    def gives_first_only(self) -> bool:
        """Whether `below` gives one position per row: the bottom is all blocks, and the top one is cut."""
        if self.depth < len(self._blocks):
            return False
        training = self._model.training
        self._model.eval()
        try:
            with torch.inference_mode():
                return self.below(probe_of(self._model)).shape[1] == 1
        except ModelError:
            # `agrees` says what that means.
            return False
        finally:
            self._model.train(training)

    def start_above(self) -> None:
        """From now on a forward pass starts from ``states``."""
        if self.depth == 0:
            self._hook = self._blocks[0].register_forward_pre_hook(lambda module, given: (self.states, *given[1:]))
            return
        for block in self._blocks[: self.depth - 1]:
            block.forward = _same
        if self._embeddings is not None:
            # Their words' lookup would be thrown away.
            self._embeddings.forward = lambda *given, **named: self.states
        self._blocks[self.depth - 1].forward = lambda *given, **named: self.states

    def restore(self) -> None:
        """Forward passes start from the words again."""
        self.states = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        for block in (*self._blocks[: self.depth], self._embeddings):
            if block is not None:
                vars(block).pop("forward", None)

    def agrees(self) -> bool:
        """Whether the model gives the same outputs from the words and from the cut, tried on two rows.

        Leaves the model as it was.
        """
        training = self._model.training
        self._model.eval()
        probe = probe_of(self._model)
        try:
            with torch.inference_mode():
                whole = self._model(**probe)[0]
                self.states = self.below(probe)
                narrow = trimmed(probe, self.states.shape[1])
                self.start_above()
                return torch.allclose(self._model(**narrow)[0], whole, rtol=1e-4, atol=1e-5)
        except (RuntimeError, IndexError, TypeError, AttributeError, ModelError):
            # A block that gives or takes something else than hidden states.
            return False
        finally:
            self.restore()
            self._model.train(training)


def _same(states: Tensor, *given: Any, **named: Any) -> Tensor:  # noqa: ARG001
    return states


def trimmed(inputs: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Inputs for states of ``width`` positions: of the first position, where nothing else is kept of a row."""
    return {name: cells[:, :width] for name, cells in inputs.items()}
