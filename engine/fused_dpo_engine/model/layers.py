"""The parts of a language model that weigh most: its layers, and what is at both ends."""

from collections import Counter
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


def untied_ends(causal_lm: Any) -> tuple[nn.Module, nn.Module] | None:
    """Find the layers of a model's input embeddings and of its head; None if they share a weight with each other, or
    with another part.
    """
    ends = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    owners = Counter(weight for part in causal_lm.modules() for weight in part.parameters(recurse=False))
    tied = ends[0] is ends[1] or any(owners[weight] > 1 for end in ends for weight in end.parameters())
    return None if tied else ends
