"""Gradients that are whole, or parts over one mesh or another: what belongs together, and the norm of all."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Part parameters into those that are whole and those of each mesh, without an empty part.

    torch's operations on lists of tensors take no mixture, and so an optimizer needs a group for each.
    """
    parts: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        parts.setdefault(mesh, []).append(parameter)
    return list(parts.values())


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients, whole ones or parts, down to a 2-norm over all of them of at most `limit`.

    Returns:
        The norm before: the same bits on every rank that holds parts of them.
    """
    parts = by_mesh(parameter for parameter in parameters if parameter.grad is not None)
    norms: list[Tensor] = []
    for part in parts:
        norm = get_total_norm([parameter.grad for parameter in part if parameter.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for part in parts:
        clip_grads_with_norm_(part, limit, total)
    return total
