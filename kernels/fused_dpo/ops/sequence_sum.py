"""Sums over the sequences of a batch, as an operator."""

import torch
from torch import Tensor

from fused_dpo.transforms import is_transformed


def sequence_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum `values` [T] over the sequences of `cu_seqlens` int64 [N+1], to [N]; an empty sequence gives 0.

    Added up in float64 and rounded once to the dtype of `values`: the result does not depend on how the rows of other
    sequences, or unscored rows (which are exactly 0), lie around it. Differentiable any number of times, in both modes;
    on CUDA, transforms of `torch.func` and tangents add in any order.
    """
    return _plain_sum(values, cu_seqlens) if is_transformed(values) else _sequence_sum_op(values, cu_seqlens)


def _sequence_of_row(rows: int, cu_seqlens: Tensor) -> Tensor:
    """Name the sequence of each row, N for rows beyond the last offset."""
    return torch.bucketize(torch.arange(rows, device=cu_seqlens.device), cu_seqlens[1:], right=True)


def _plain_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum by functions of torch that have every derivative, and a rule for `vmap`."""
    N = cu_seqlens.shape[0] - 1
    total = values.new_zeros(N + 1, dtype=torch.float64)
    return total.index_add(0, _sequence_of_row(values.shape[0], cu_seqlens), values.double())[:N].to(values.dtype)


@torch.library.custom_op("fused_dpo::sequence_sum", mutates_args=())
def _sequence_sum_op(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    total = torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens, unsafe=True, initial=0.0)
    return total.to(values.dtype)


@_sequence_sum_op.register_fake
def _(values, cu_seqlens):
    return values.new_empty(cu_seqlens.shape[0] - 1)


def _setup_sequence_sum(ctx, inputs, output) -> None:
    values, cu_seqlens = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.rows = values.shape[0]


def _sequence_sum_gradient(ctx, dsums: Tensor):
    (cu_seqlens,) = ctx.saved_tensors
    # Rows beyond the last offset belong to none: an index out of bounds would end the process's use of a GPU.
    return torch.cat((dsums, dsums.new_zeros(1)))[_sequence_of_row(ctx.rows, cu_seqlens)], None


_sequence_sum_op.register_autograd(_sequence_sum_gradient, setup_context=_setup_sequence_sum)
