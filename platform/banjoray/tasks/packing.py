"""Short texts in one block, as if each stood alone: no padding, and the same losses.

Positions start again at 0 with every text, and a mask keeps every token from those of other texts.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from banjoray.config.job import JobConfig
from banjoray.data.tokens import Features
from banjoray.errors import ConfigError


def packed(features: Features, most: int) -> Features:
    """The features, as many in each block of at most ``most`` tokens as follow each other and fit.

    A block is of the row of its last feature.
    """
    assert features.targets is not None
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    targets: list[list[int]] = []
    rows: list[int] = []
    for read, found, row in zip(features.inputs["input_ids"], features.targets, features.rows, strict=True):
        if not ids or len(ids[-1]) + len(read) > most:
            for blocks in (ids, positions, targets):
                blocks.append([])
            rows.append(row)
        ids[-1].extend(map(int, read))
        positions[-1].extend(range(len(read)))
        targets[-1].extend(found)
        rows[-1] = row
    return Features({"input_ids": ids, "position_ids": positions}, rows, targets=targets, cut=features.cut)


def apart(
    inputs: dict[str, np.ndarray],
    targets: np.ndarray,
    rows: np.ndarray,  # noqa: ARG001
    epoch: int | None,  # noqa: ARG001
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs with the mask of their blocks, (rows, 1, tokens, tokens) bool: true where a token is seen by another.

    A cell of padding has position 0 and so is a text of its own, which sees itself.
    """
    texts = (inputs["position_ids"] == 0).cumsum(axis=1)
    width = texts.shape[1]
    seen = (texts[:, :, None] == texts[:, None, :]) & np.tri(width, dtype=bool)
    return inputs | {"attention_mask": seen[:, None]}, targets


def check_packing(job: JobConfig, config: Any) -> None:
    """Refuse a decoder that is not told positions, or does not look at others through a mask alone."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    kinds: Sequence[Any] = [getattr(transformers, name) for name in ([names] if isinstance(names, str) else names)]
    told = all("position_ids" in inspect.signature(kind.forward).parameters for kind in kinds)
    masked = all(getattr(kind, "_supports_sdpa", False) for kind in kinds)
    if not (kinds and told and masked):
        raise ConfigError(
            f"data.packing: {job.model.base} is of kind {config.model_type}, whose texts would see each other in "
            "a block; set data.packing=false"
        )
