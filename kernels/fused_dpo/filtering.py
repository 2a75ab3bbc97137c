"""Which entries of the logits' gradient are dropped, and the theorem that bounds what that costs."""

import torch
from torch import Tensor

EVERYTHING = 255
"""The exponent of a column that no threshold drops."""
BIAS = 127
"""Exponent e stands for probabilities in [2^(e-BIAS), 2^(e-BIAS+1))."""


def means_of_blocks(values: Tensor, block_of_row: Tensor, blocks: int) -> Tensor:
    """Means [blocks] of `values` [R] over each block, `block_of_row` int64 [R] ascending.

    Not by `scatter_reduce`, which adds in any order on CUDA: other last bits in a threshold keep other entries.
    """
    offsets = torch.searchsorted(block_of_row, torch.arange(blocks + 1, device=values.device))
    return torch.segment_reduce(values, "mean", offsets=offsets, unsafe=True)


class Judgement:
    """What is dropped, now that the upstream gradients are known.

    With G the largest |upstream| in a block, s the root mean square of its rows' surprise, and S that of
    |upstream| * surprise over all rows, an entry of the logits' gradient is dropped if for sure, that is by the upper
    end of its exponent, it is at most `eps * max(G s, S)`. Targets are kept, unless `|upstream| * surprise <= eps * S`.

    Args:
        block_of_row: int64 [R], ascending.
        blocks: how many there are.
        upstream, surprise: [R], the latter 1 - p of the target: the size of the row's gradient is about their product.
            Where they are not finite nothing is dropped.
        target: int64 [R], V where there is none.
        eps: the filter's threshold.
    """

    def __init__(
        self, block_of_row: Tensor, blocks: int, upstream: Tensor, surprise: Tensor, target: Tensor, eps: float
    ) -> None:
        self.block_of_row, self.target = block_of_row, target
        self.magnitude = upstream.abs()
        # Rows without gradient are out of it, whatever their hidden states are.
        size = torch.where(upstream == 0, 0.0, (upstream * surprise).abs())
        zeros = upstream.new_zeros(blocks)
        self.largest = zeros.scatter_reduce(0, block_of_row, self.magnitude, "amax")
        known = torch.where((upstream == 0) & ~surprise.isfinite(), 0.0, surprise)
        squares = means_of_blocks(known.square(), block_of_row, blocks)
        scale = size.square().mean().sqrt() if size.numel() else zeros.sum()
        scale = torch.where(scale.isfinite(), scale, torch.nan)  # and NaN is below no limit
        self.negligible = eps * scale
        self.smallest = torch.maximum(eps * self.largest * squares.sqrt(), self.negligible)
        self.judged = size > self.negligible

    def columns(self, levels: Tensor) -> Tensor:
        """Columns that each block keeps, bool [blocks, V], by the exponents of its largest [blocks, V].

        Of more than half of the columns all are kept: gathering them would cost more.
        """
        limit = ((self.smallest / self.largest).log2() + (BIAS - 1)).floor().clamp(min=-1, max=BIAS)
        keep = levels >= (limit.nan_to_num(nan=-1.0) + 1).to(torch.uint8)[:, None]
        keep &= ~(self.largest <= self.negligible)[:, None]
        _keep_targets(keep, self.block_of_row, self.target, self.judged)
        for part in keep.split(16):  # sums of bool are taken in int64, eight times their size
            part |= part.sum(1, keepdim=True) > part.shape[1] // 2
        return keep


def _keep_targets(keep: Tensor, row: Tensor, column: Tensor, judged: Tensor) -> None:
    """Set `keep[row, column]` where `judged`, without waiting for the device to tell how many those are."""
    flat = row * keep.shape[1] + column.clamp(0, keep.shape[1] - 1)
    judged = judged & (column >= 0) & (column < keep.shape[1])
    keep.view(torch.uint8).view(-1).scatter_reduce_(0, flat, judged.to(torch.uint8), "amax")
