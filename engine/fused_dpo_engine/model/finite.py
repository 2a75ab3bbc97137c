"""Weights that are no longer numbers: found by name, before they are trained or saved."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def first_not_finite(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name the first of some weights that holds a NaN or an infinity; None if all are finite.

    Reads every weight once and makes no tensor of its size; one transfer from each device.

    Args:
        weights: with their names. Of a DTensor this rank's share is looked at. Quantised ones, of fewer than 16 bits a
            number, are passed over.
    """
    largest: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, weight in weights:
        here = weight.to_local() if isinstance(weight, DTensor) else weight
        if here.is_floating_point() and here.dtype.itemsize >= 2 and here.numel():
            low, high = torch.aminmax(here)  # both NaN if there is one
            largest.setdefault(here.device, []).append((name, torch.maximum(high.double(), -low.double())))
    for found in largest.values():
        values = torch.stack([value for _, value in found]).tolist()
        for (name, _), value in zip(found, values, strict=True):
            if not math.isfinite(value):
                return name
    return None
