"""Rows by index, some of them several times, with a gradient that has the same bits from run to run."""

from typing import Any

import torch
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,), (gradient,) = ctx.saved_tensors, gradients
        total = gradient.new_zeros(ctx.num_rows, *gradient.shape[1:])
        if gradient.is_cuda:
            # index_add_, which index_select's own backward calls, adds in any order there; this one sorts first.
            return total.index_put_((index,), gradient, accumulate=True), None
        return total.index_add_(0, index, gradient), None


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[index]` for rows [T, ...] and int64 index [K].

    A row that is taken several times (a shared prompt, by every response) gets the sum of its gradients, added in the
    order of `index` on CPU and CUDA alike. Differentiable once.
    """
    return _GatherRows.apply(rows, index)  # pyright: ignore[reportReturnType]
