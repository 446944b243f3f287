"""What becomes of a head that a base model has, in words: transformers' own are kept out of the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from banjoray.models.blocks import base_prefix

# Names of a list that are shown.
SHOWN = 5


def head_lines(model: Any, loading: Mapping[str, Any], before: Sequence[str]) -> list[str]:
    """A line for each part of the head that has another size than in the base; none where the base has no head.

    Where the head was taken over whole, and with it labels that the job calls by other names, a line too. ``loading``
    is from_pretrained's loading info; ``before`` are the base's label names, none where the task has no labels.
    """
    unit = "labels" if before else "outputs"
    sizes: dict[str, Any] = {}
    for name, found, needed in sorted(loading["mismatched_keys"]):
        pairs = zip(found, needed, strict=False)
        sizes[name.rpartition(".")[0]] = next((pair for pair in pairs if pair[0] != pair[1]), (found, needed))
    if sizes:
        return [f"{module} re-initialised: {was} -> {now} {unit}" for module, (was, now) in sizes.items()]
    names = tuple(model.config.id2label.values())
    if not before or before == names:
        return []
    inside = base_prefix(model)
    head = [name for name, _ in model.named_parameters() if not name.startswith(inside)]
    if not head or set(head) & set(loading["missing_keys"]):
        return []
    module = head[-1].rpartition(".")[0]
    return [f"{module} kept: its {len(names)} labels were named {_listed(before)}; now {_listed(names)}"]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
