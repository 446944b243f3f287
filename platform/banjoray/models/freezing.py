"""Which weights a run leaves as they are."""

from fnmatch import fnmatchcase
from typing import Any

from banjoray.config.train import Freeze, FreezeBitfit, FreezeLayers, FreezePatterns
from banjoray.errors import ModelError
from banjoray.models.blocks import base_prefix, find_blocks


def frozen_names(model: Any, freeze: Freeze) -> set[str]:
    """The full names of the parameters that ``freeze`` names.

    Raises ModelError: more layers than the model has, a pattern that matches nothing, a model that can't be cut, bitfit
    without biases.
    """
    base = base_prefix(model)
    names = [name for name, _ in model.named_parameters()]
    match freeze:
        case "none":
            return set()
        case "backbone":
            return {name for name in names if name.startswith(base)}
        case "embeddings":
            return _embeddings(model, base)
        case FreezeLayers(layers=count):
            return _lowest(model, base, count)
        case FreezePatterns(patterns=patterns):
            return {name for pattern in patterns for name in _matching(names, base, pattern)}
        case FreezeBitfit(bitfit=True):
            return _all_but_biases(model, [name for name in names if name.startswith(base)])


def freeze_parameters(model: Any, freeze: Freeze) -> tuple[int, int]:
    """Freeze in place; (trainable, all) as numbers of weights."""
    frozen = frozen_names(model, freeze)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    trainable, weights = count_weights(model)
    if not trainable:
        raise ModelError(f"freeze: {freeze!r} leaves nothing to train; free at least one parameter")
    return trainable, weights


def count_weights(model: Any) -> tuple[int, int]:
    """(trainable, all) as numbers of weights; shared ones count once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _embeddings(model: Any, base: str) -> set[str]:
    return {base + name for name in find_blocks(model).embeddings}


def _lowest(model: Any, base: str, count: int) -> set[str]:
    blocks = find_blocks(model)
    if blocks.shared:
        raise ModelError(
            f"freeze.layers: {type(model).__name__} shares {blocks.depth} block between all its depths, so there is no "
            "lower part to freeze; use none, embeddings or backbone"
        )
    if count > blocks.depth:
        raise ModelError(f"freeze.layers: found {count}; this model has {blocks.depth} blocks ({blocks.stack})")
    below = tuple(f"{base}{blocks.stack}.{number}." for number in range(count))
    return _embeddings(model, base) | {name for name, _ in model.named_parameters() if name.startswith(below)}


def _all_but_biases(model: Any, names: list[str]) -> set[str]:
    frozen = {name for name in names if name.rpartition(".")[2] != "bias"}
    if len(frozen) == len(names):
        raise ModelError(
            f"freeze.bitfit: the base model of {type(model).__name__} has no biases; "
            "use backbone to train the head alone, or an adapter"
        )
    return frozen


def _matching(names: list[str], base: str, pattern: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name.removeprefix(base), pattern)]
    if not found:
        example = names[min(5, len(names) - 1)].removeprefix(base)
        raise ModelError(f"freeze.patterns: '{pattern}' matches no parameter; names look like '{example}'")
    return found
