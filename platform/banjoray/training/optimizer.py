"""AdamW over what is trained, and its moments by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from banjoray.config.job import JobConfig
from banjoray.models.blocks import heights

MOMENTS = ("exp_avg", "exp_avg_sq")


def rate_scales(job: JobConfig, model: Any) -> dict[str, float]:
    """Parameter name -> by what the learning rate is multiplied for it: layer-wise decay, 1 at the top.

    Howard and Ruder 2018 (arXiv:1801.06146) call it discriminative fine-tuning.
    """
    decay = job.train.layerwise_lr_decay
    if decay == 1:
        return {name: 1.0 for name, _ in model.named_parameters()}
    return {name: float(decay**height) for name, height in heights(model).items()}


def adamw(job: JobConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW over what is trained; no weight decay on biases and norms (every parameter of one dimension)."""
    scales = rate_scales(job, model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = job.train.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((scales[name], decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "rate_scale": scale, "weight_decay": decay}
            for (scale, decay), parameters in groups.items()
        ],
        lr=job.train.learning_rate,
        eps=job.train.adam_epsilon,
        fused=True,
    )


def set_rate(optimizer: Any, learning_rate: float) -> None:
    """The rate of the next step, scaled for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_scale"]


def fresh_state(parameter: Tensor, steps: int) -> dict[str, Tensor]:
    """AdamW's state of one parameter after ``steps`` steps, moments 0."""
    counter = torch.tensor(float(steps), dtype=torch.float32, device=parameter.device)
    return {"step": counter} | {moment: torch.zeros_like(parameter) for moment in MOMENTS}


def plain_moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an optimizer that holds whole parameters, as copies on the CPU."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment].to("cpu", copy=True)
        for name, parameter in module.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def restore_plain_moments(
    module: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor], steps: int
) -> None:
    """Put moments into an optimizer that holds whole parameters."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = fresh_state(parameter, steps)
            for moment in MOMENTS:
                optimizer.state[parameter][moment].copy_(moments[f"{moment}.{name}"])
