"""What autograd saves in the backbone, kept in host memory until the backward pass asks for it."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SHARE_OF_A_ROW = 4
"""What is narrower than hidden size / 4 a token stays where it is: rotary tables, norms' statistics, log-sum-exps."""


class OnHost(NamedTuple):
    """A saved tensor, away from its device."""

    values: Tensor
    device: torch.device


class ActivationOffload:
    """Moves what a forward pass saves to pinned host memory, and back in its backward pass.

    Weights stay, their copies by autocast and what FSDP2 has gathered included: moving these would cross the bus with
    the whole model. Hooks see tensors without names, so one of the shape of a weight is taken for a weight, unless the
    number of token slots is in its shape. A mistake costs traffic or memory, never a bit of the result.

    torch's `save_on_cpu` does the same for everything, the weights too, and makes all of it contiguous, after which
    products may round otherwise. Copies are queued on the stream that computes, which keeps them in order without
    waiting. They overlap with nothing, so a layer's inputs alone are worth moving: combine it with gradient
    checkpointing, which saves no more than these. A tensor that several operations save crosses once for each of them.

    Args:
        parameters: of the model, before they are sharded or as DTensors: shapes are those of whole weights.
        hidden_size: numbers a token in the stream between layers.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], hidden_size: int) -> None:
        self._weights = {shape for p in parameters if p.ndim >= 2 for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
        self._narrow = hidden_size // SHARE_OF_A_ROW
        self.moved = 0
        """Bytes that have gone to the host so far."""

    def hooks(self, tokens: int) -> saved_tensors_hooks:
        """Make the context for the forward pass of so many token slots."""

        def stays(tensor: Tensor) -> bool:
            if tensor.numel() < tokens * self._narrow:
                return True
            return tuple(tensor.shape) in self._weights and tokens not in tensor.shape

        def pack(tensor: Tensor) -> Tensor | OnHost:
            if stays(tensor):
                return tensor
            self.moved += tensor.numel() * tensor.element_size()
            return self._to_host(tensor)

        return saved_tensors_hooks(pack, _unpack)

    def _to_host(self, tensor: Tensor) -> OnHost:
        # In the same order of memory: matrix products of other strides round otherwise.
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return OnHost(host.copy_(tensor, non_blocking=tensor.is_cuda), tensor.device)


def _unpack(saved: Tensor | OnHost) -> Tensor:
    return saved.values.to(saved.device, non_blocking=True) if isinstance(saved, OnHost) else saved
