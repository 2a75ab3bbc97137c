"""Rows by index, some of them several times, with a gradient that has the same bits from run to run."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("fused_dpo_engine::sum_rows", mutates_args=())
def _sum_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Sum `rows` [K, ...] by `index`, to [num_rows, ...]; an operator, as code compiled of it would add atomically."""
    total = rows.new_zeros(num_rows, *rows.shape[1:])
    if rows.is_cuda:
        # index_add_, which index_select's own backward calls, adds in any order there; this one sorts first.
        return total.index_put_((index,), rows, accumulate=True)
    return total.index_add_(0, index, rows)


@_sum_rows.register_fake
def _(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return rows.new_empty(num_rows, *rows.shape[1:])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,), (gradient,) = ctx.saved_tensors, gradients
        return _sum_rows(gradient, index, ctx.num_rows), None


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Take `rows[index]` of rows [T, ...] for int64 index [K].

    A row that is taken several times (a shared prompt, by every response) gets the sum of its gradients, added in the
    order of `index` on CPU and CUDA alike. Differentiable once.
    """
    return _GatherRows.apply(rows, index)  # pyright: ignore[reportReturnType]
