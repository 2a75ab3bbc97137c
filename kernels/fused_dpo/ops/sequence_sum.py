"""Sums over the sequences of a batch, as an operator."""

import torch
from torch import Tensor


@torch.library.custom_op("fused_dpo::sequence_sum", mutates_args=())
def sequence_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum `values` [T] over the sequences of `cu_seqlens` int64 [N+1], to [N]; an empty sequence gives 0.

    Added up in float64 and rounded once to the dtype of `values`: the result does not depend on how the rows of other
    sequences, or unscored rows (which are exactly 0), lie around it.
    """
    total = torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens, unsafe=True, initial=0.0)
    return total.to(values.dtype)


@sequence_sum.register_fake
def _(values, cu_seqlens):
    return values.new_empty(cu_seqlens.shape[0] - 1)


def _setup_sequence_sum(ctx, inputs, output) -> None:
    values, cu_seqlens = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.rows = values.shape[0]


def _sequence_sum_gradient(ctx, dsums: Tensor):
    (cu_seqlens,) = ctx.saved_tensors
    sequence_of_row = torch.bucketize(torch.arange(ctx.rows, device=dsums.device), cu_seqlens[1:], right=True)
    # Rows beyond the last offset belong to none: an index out of bounds would end the process's use of a GPU.
    return torch.cat((dsums, dsums.new_zeros(1)))[sequence_of_row], None


sequence_sum.register_autograd(_sequence_sum_gradient, setup_context=_setup_sequence_sum)
