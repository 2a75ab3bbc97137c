"""The layers of a language model, told by what they weigh."""

from typing import Any

from torch import nn

from fused_dpo import backbone_of
from fused_dpo_engine.errors import UserError


def decoder_layers(causal_lm: Any) -> nn.ModuleList:
    """Find the layers of a language model: the list that holds most of its weights.

    Raises:
        UserError: it has no list.
    """
    lists = [part for part in backbone_of(causal_lm).modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise UserError(
            f"{type(causal_lm).__name__} has no list of layers, which --strategy fsdp2 and memory estimates go by; "
            f"take --strategy ddp."
        )
    return max(lists, key=lambda part: sum(parameter.numel() for parameter in part.parameters()))


def checkpoint_layers(causal_lm: Any) -> None:
    """Let the layers save their inputs alone, and compute the rest again in the backward pass.

    Releases of transformers have it by two names, the older of which warns in newer ones.
    """
    settings = {"use_reentrant": False}
    if hasattr(causal_lm, "activation_checkpointing_enable"):
        causal_lm.activation_checkpointing_enable(settings)
    else:
        causal_lm.gradient_checkpointing_enable(settings)
