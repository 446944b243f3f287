"""The top block computes only what the head reads.

The usual classification heads look at one position, the first. All others of the top block's output are thrown away:
its feed-forward part, most of the block, is then work for nothing. Cut there, the outputs and gradients are the same,
and a model of six blocks does an eighth less. Of the top two blocks alone it is three eighths.
"""

from typing import Any

from banjoray.errors import ModelError
from banjoray.models.blocks import find_blocks, probe_of

# What first comes after attention in a block and is given all it will need of it: BERT's, RoBERTa's and ELECTRA's
# output layer (with the residual), DistilBERT's norm (of the sum).
AFTER_ATTENTION = ("attention.output", "sa_layer_norm")


def read_first_only(model: Any) -> bool:
    """Cut the top block to its first position, in place; whether it was done.

    Done only where the model gives the same outputs on a probe: a head that reads another position would not.
    The probe is a forward pass in evaluation mode; it draws no random numbers.
    """
    import torch

    part = _after_attention(model)
    if part is None:
        return False
    training = model.training
    model.eval()
    whole = _probe(model)
    hook = part.register_forward_pre_hook(_first)
    try:
        found = _probe(model)
        # A head that answers every token gives fewer answers now; numbers alone would be stretched to compare.
        same = found.shape == whole.shape and torch.allclose(found, whole, rtol=1e-4, atol=1e-5)
    except (RuntimeError, IndexError):
        # A head that takes a position which is gone, or as many answers as there are tokens.
        same = False
    if not same:
        hook.remove()
    model.train(training)
    return same


def _after_attention(model: Any) -> Any:
    if getattr(model.config, "is_encoder_decoder", False):
        # Its decoder reads every position.
        return None
    try:
        blocks = find_blocks(model)
    except ModelError:
        return None
    if blocks.shared:
        return None
    top = model.base_model.get_submodule(blocks.stack)[-1]
    parts = dict(top.named_modules())
    return next((parts[path] for path in AFTER_ATTENTION if path in parts), None)


def _first(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001
    return tuple(cells[:, :1] for cells in inputs)


def _probe(model: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model(**probe_of(model))[0].float()
