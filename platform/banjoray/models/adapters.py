"""PEFT adapters: small matrices inside a frozen transformer; put in, folded into its weights, or saved beside it.

The model keeps its class, its config and the names of all parameters that get no adapter; a layer that gets one
has its own weights under ``base_layer.`` from then on. PEFT takes seconds to import and is imported where it is used.
"""

import copy
import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from banjoray.config.train import AdapterConfig, Freeze, FreezeLayers
from banjoray.errors import ConfigError, ModelError
from banjoray.models.blocks import base_prefix, find_blocks
from banjoray.models.freezing import frozen_names

# The name that PEFT gives to the only adapter of a model.
NAME = "default"


def attach(model: Any, adapter: AdapterConfig, freeze: Freeze, seed: int) -> Any:
    """The same model with adapters in it; they and the head are trainable, everything else is frozen.

    ``freeze`` none: every block gets adapters; {layers: k}: blocks k and above. The values that are drawn are a
    function of ``seed`` alone, on any device; the random state of the caller stays as it is. On the meta device no
    memory is used.
    Raises ConfigError: another freeze. ModelError: target_modules that the model doesn't have.
    """
    import torch
    from peft import inject_adapter_in_model

    config = _peft_config(model, adapter, _targets(model, adapter, freeze))
    # Values are drawn on the CPU and moved, so that a GPU starts from the same ones.
    drawn_on = "meta" if next(model.parameters()).device.type == "meta" else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(drawn_on):
        # Not torch.manual_seed, which would also seed the GPUs of the caller.
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=NAME)
    base, added = base_prefix(model), adapted_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in added or not name.startswith(base))
    return model


def adapted_names(model: Any) -> set[str]:
    """The full names of the parameters that adapters added; none for a model without adapters."""
    return {
        f"{path}.{name}"
        for path, layer in _adapted_layers(model)
        for name, _ in layer.named_parameters()
        if not name.startswith("base_layer.")
    }


def merge(model: Any) -> None:
    """Fold the adapters into the weights, in place: the same outputs from a model without adapters.

    The names are those from before `attach`. Where training goes on, merge a copy (``copy.deepcopy``).
    """
    import torch

    with torch.no_grad():
        for path, layer in _adapted_layers(model):
            layer.merge()
            model.set_submodule(path, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write adapters and head, before `merge`, in PEFT's format: adapter_config.json, adapter_model.safetensors.

    ``PeftModel.from_pretrained(model, folder)`` gives the same outputs, where ``model`` is the base ``base`` loaded
    with as many labels as this one.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # save_embedding_layers "auto" would ask the hub for the base's config.
    weights = dict(get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False))
    inside = base_prefix(model)
    heads = sorted({name.partition(".")[0] for name, _ in model.named_parameters() if not name.startswith(inside)})
    weights |= {name: tensor for name, tensor in model.state_dict().items() if name.partition(".")[0] in heads}
    config = copy.copy(model.peft_config[NAME])
    # PEFT writes sets in an order that changes from process to process.
    vars(config).update({name: sorted(value) for name, value in vars(config).items() if isinstance(value, set)})
    config.modules_to_save = heads or None
    config.base_model_name_or_path = base
    config.inference_mode = True
    origin = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=origin)
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _adapted_layers(model: Any) -> list[tuple[str, Any]]:
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]


def _targets(model: Any, adapter: AdapterConfig, freeze: Freeze) -> list[str]:
    """Full names of the layers that get an adapter."""
    if freeze != "none" and not isinstance(freeze, FreezeLayers):
        raise ConfigError(
            f"adapter: found freeze {freeze!r}; an adapter goes with freeze none or {{layers: k}}, "
            "since it freezes all other weights itself"
        )
    linear = _linear_layers(model)
    if adapter.target_modules == "auto":
        found = _usual_layers(model, adapter.type, linear)
    else:
        matched = {name for wanted in adapter.target_modules for name in _named(model, wanted, linear)}
        found = [name for name in linear if name in matched]
    frozen = frozen_names(model, freeze)
    targets = [name for name in found if f"{name}.weight" not in frozen]
    if not targets:
        raise ModelError(
            f"adapter: of the {len(found)} layers that adapter.target_modules names, freeze {freeze!r} leaves none; "
            "freeze fewer layers, or leave the adapter out"
        )
    return targets


def _linear_layers(model: Any) -> list[str]:
    """Full names of the base model's linear layers; Conv1D is how GPT-2 writes one."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    base = base_prefix(model)
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(base) and isinstance(module, nn.Linear | Conv1D)
    ]


def _usual_layers(model: Any, method: str, linear: list[str]) -> list[str]:
    """PEFT's choice for the architecture; where it has none, all linear layers of the stack of blocks."""
    from peft.utils import (
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    )

    choices: dict[str, Any] = (
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
        if method == "ia3"
        else TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    )
    choice = choices.get(model.config.model_type, ())
    if isinstance(choice, str):
        known = [name for name in linear if re.fullmatch(choice, name)]
    else:
        known = [name for name in linear if any(_ends_with(name, wanted) for wanted in choice)]
    if known:
        return known
    stack = f"{base_prefix(model)}{find_blocks(model, 'adapter.target_modules', 'name the layers').stack}."
    return [name for name in linear if name.startswith(stack)]


def _named(model: Any, wanted: str, linear: list[str]) -> list[str]:
    found = [name for name in linear if _ends_with(name, wanted)]
    if not found:
        parts = wanted.count(".") + 1
        ends = sorted({".".join(name.split(".")[-parts:]) for name in linear})
        near = difflib.get_close_matches(wanted, ends, n=3, cutoff=0.7)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(ends[:12])}"
        raise ModelError(
            f"adapter.target_modules: '{wanted}' matches no linear layer in the base of {type(model).__name__}; {hint}"
        )
    return found


def _ends_with(name: str, wanted: str) -> bool:
    """Whether ``name`` is ``wanted`` or ends with it, in whole parts; PEFT's rule."""
    return f".{name}".endswith(f".{wanted}")


def _peft_config(model: Any, adapter: AdapterConfig, targets: list[str]) -> Any:
    from peft import IA3Config, LoraConfig
    from transformers.pytorch_utils import Conv1D

    # Conv1D keeps its weight as (in, out). PEFT finds that out by itself, with a warning.
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in targets)
    if adapter.type == "ia3":
        scaled_inputs = _feedforward(model, targets)
        return IA3Config(target_modules=targets, feedforward_modules=scaled_inputs, fan_in_fan_out=transposed)
    # PEFT computes with any alpha and declares a whole number, which other readers of its config may insist on.
    alpha: Any = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    return LoraConfig(
        r=adapter.r,
        lora_alpha=alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.type == "dora",
        target_modules=targets,
        fan_in_fan_out=transposed,
    )


def _feedforward(model: Any, targets: Collection[str]) -> list[str]:
    """The targets whose inputs IA3 scales, in place of their outputs: PEFT's choice, else layers that narrow."""
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING

    choice: Any = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model.config.model_type)
    if choice is not None:
        return [name for name in targets if any(_ends_with(name, wanted) for wanted in choice)]
    return [name for name in targets if _narrows(model.get_submodule(name))]


def _narrows(layer: Any) -> bool:
    """Whether a linear layer has more inputs than outputs, as the second one of a feed-forward part."""
    from torch import nn

    inputs, outputs = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else layer.weight.shape
    return bool(inputs > outputs)
