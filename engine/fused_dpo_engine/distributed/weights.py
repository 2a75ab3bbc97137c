"""Weights that ranks hold parts of, put together to be saved."""

from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict


def whole_weights(model: nn.Module, *, trained_alone: bool = False) -> dict[str, Any]:
    """Gather the weights of a model, on the host of rank 0; empty on the others. All ranks have to call it.

    Args:
        model: some of its parameters are DTensors.
        trained_alone: leave frozen weights out.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_alone)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in weights:  # tied weights are one tensor again, which is how they are known when they are saved
            weights[name] = weights[first.setdefault(id(parameter), name)]
    return weights
