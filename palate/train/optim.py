"""The optimizer and its learning-rate schedule, from a config that imports no torch."""

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from palate.errors import UsageError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class UpdateConfig(BaseModel):
    """How gradients become updates, but for the learning rate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    optimizer: Annotated[
        Literal["adamw", "rmsprop"], Field(description="adamw, or rmsprop as in the DPO paper's runs")
    ] = "adamw"
    schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        Field(description="After warm-up: constant (the DPO paper), or falling to zero just after the last step"),
    ] = "constant"
    warmup_steps: Annotated[
        int | None,
        Field(ge=0, description="Steps from zero to the peak rate; default: a tenth of the run, at most 150"),
    ] = None
    weight_decay: Annotated[
        float, Field(ge=0, lt=1, description="Weight decay: decoupled in adamw, added to the gradient in rmsprop")
    ] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1, description="AdamW's decay of the first moment")] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="AdamW's decay of the second moment; RMSprop's is 0.99")] = (
        0.999
    )
    eps: Annotated[float, Field(gt=0, lt=1, description="Added to the root of the second moment")] = 1e-8
    clip_norm: Annotated[
        float, Field(gt=0, description="Gradient norm above which gradients are scaled down; inf for never")
    ] = 10.0


class OptimConfig(UpdateConfig):
    """How gradients become updates."""

    lr: Annotated[float, Field(gt=0, lt=math.inf, description="Peak learning rate")] = 5e-7


def learning_rate(config: OptimConfig, step: int, total: int | None) -> float:
    """The rate of update `step` (from 1) of `total`: linear warm-up, then the schedule.

    total None: a run of unknown length, which a constant schedule alone can serve (UsageError otherwise); its warm-up
    is then `warmup_steps`, or none.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = min(150, (total or 0) // 10)
    if step <= warmup:
        return config.lr * step / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    if total is None:
        raise UsageError(f"a {config.schedule} schedule needs the number of steps", next="give --steps")
    progress = (step - warmup - 1) / max(total - warmup, 1)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: "nn.Module", config: OptimConfig) -> "Optimizer":
    """An optimizer over the parameters that require gradients, in the model's order."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UsageError("no parameter of the model is trainable", next="unfreeze some, or add an adapter")
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused,
    )
