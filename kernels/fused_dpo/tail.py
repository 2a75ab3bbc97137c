"""The correction for what filtered gradients drop: one distribution per block over its other columns."""

import torch
from torch import Tensor

from fused_dpo.operands import Operands, even_bounds, shifted_exp
from fused_dpo.precision import accumulate_product, matmul_precision, product


def mean_weights(residual: Tensor) -> Tensor:
    """Weights of the rows of blocks [..., rows] in their mean hidden state: by what they have to spread."""
    share = residual.abs()
    return share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)


def spread_tail(operands: Operands, mean: Tensor, keep: Tensor, width: int) -> Tensor:
    """`q @ weight` of every block [blocks, K], with the derivative of what happens to the logits.

    q is the softmax over the dropped columns at the block's mean hidden state. Offsets of single rows cancel, so it is
    the geometric mean of the rows' tails, normalised. 0 where nothing is dropped.

    Args:
        operands: of the rows.
        mean: operand [blocks or more, K].
        keep: bool [blocks, V].
        width: columns to take at a time; three times `width * blocks` numbers are held.
    """
    blocks, V = keep.shape
    dtype, device = operands.acc_dtype, keep.device
    lowest = torch.finfo(dtype).min
    spread = torch.zeros(blocks, operands.width, dtype=dtype, device=device)
    peak = torch.full((blocks,), lowest, dtype=dtype, device=device)
    total = torch.zeros_like(peak)
    buffer = operands.buffer(0 if operands.is_operand(operands.held_dtype) else width)
    for start, stop in even_bounds(V, width):
        weight = operands.weight_slice(slice(start, stop), buffer)
        z = torch.empty(mean.shape[0], stop - start, dtype=dtype, device=device)
        with matmul_precision(operands.dtype):
            product(mean, weight.T, out=z)
        z = operands.to_logits(z, operands.bias(slice(start, stop)))[:blocks]
        dropped = ~keep[:, start:stop]
        new_peak = torch.maximum(peak, z.masked_fill(~dropped, -torch.inf).amax(1))
        shift = torch.where(new_peak > lowest, new_peak, z.amax(1).clamp(min=lowest))  # nothing dropped: stay finite
        q = shifted_exp(z, shift, torch.empty_like(z)).mul_(dropped)
        rescale = (peak - new_peak).exp_()
        total = total * rescale + q.sum(1)
        operands.through_logits(q, z)
        with matmul_precision(operands.dtype):
            accumulate_product(spread.mul_(rescale[:, None]), q, weight)
        peak = new_peak
    return spread / torch.where(total > 0, total, 1.0)[:, None]
