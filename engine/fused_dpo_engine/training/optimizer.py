"""AdamW and the course of its learning rate."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fused_dpo_engine.config.options import OptimizerOptions
from fused_dpo_engine.distributed.gradients import by_mesh
from fused_dpo_engine.training.adamw8bit import load_adamw8bit


def learning_rate_factor(step: int, total: int, warmup: int, scheduler_type: str) -> float:
    """Compute the factor on the peak learning rate in step 0, 1, ..., total - 1.

    It rises linearly over `warmup` steps, reaching 1 in the last of them (so that no step is spent at 0), and falls to
    0 just after the last step: linearly, as half a cosine, or not at all.
    """
    if step < warmup:
        return (step + 1) / warmup
    if scheduler_type == "constant":
        return 1.0
    progress = (step - warmup) / max(total - warmup, 1)
    if scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress


def check_optimizer(options: OptimizerOptions) -> None:
    """Find out before anything is loaded whether the optimizer is there.

    Raises:
        UserError: it is not.
    """
    if options.optimizer == "adamw8bit":
        load_adamw8bit()


def build_optimizer(
    parameters: Iterable[nn.Parameter], options: OptimizerOptions, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Build AdamW for the trainable parameters, decaying matrices alone, and the learning rates of `total_steps`.

    Raises:
        UserError: --optimizer adamw8bit without bitsandbytes.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    matrices, others = [p for p in trainable if p.ndim >= 2], [p for p in trainable if p.ndim < 2]
    groups = [
        {"params": part, "weight_decay": decay}
        for parameters, decay in ((matrices, options.weight_decay), (others, 0.0))
        for part in by_mesh(parameters)
    ]
    settings: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
    }
    optimizer: torch.optim.Optimizer
    if options.optimizer == "adamw8bit":
        optimizer = load_adamw8bit()(groups, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    warmup = round(options.warmup_ratio * total_steps)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total_steps, warmup, options.lr_scheduler_type)
    )
    return optimizer, lr_scheduler
