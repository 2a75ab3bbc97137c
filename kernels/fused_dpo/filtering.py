"""Screen, keep, correct: which entries of the logits' gradient are computed, and the theorem that bounds the rest.

A trained model's softmax is nearly empty: of 50,000 columns a row gives about 100 more than 2^-12 (measured on real
hidden states). The forward *screens*: for each block of up to 128 scored rows it notes how large a probability each
column reaches, and how large it is on average. The backward *keeps* the columns that matter, with exact probabilities,
and *corrects* for the rest: a dropped column's mean probability in the block stands for that of each row, scaled for
the hidden states' gradient so that every row of the gradient of the logits that keeps its target sums to zero.

A screen is `uint8 [blocks, 2, V]`: for each block of scored rows and each column the (biased, as in fp32) exponent of
the largest probability that any of the rows gives it, or EVERYTHING throughout a block that is to be computed exactly;
and the exponent of the mean. Exponents of the largest, not bits, so that the backward can choose the threshold by what
it knows then, the upstream gradient, without a second look at the logits.

Error budget. Row r has upstream gradient g_r, probabilities p(r,v) and target y_r; its gradient of the logits is
`dz_r = g_r (onehot(y_r) - p_r)`, of size |g_r| (1 - p(r,y_r)) up to a factor of sqrt(2). In a block G is the largest
|g_r| and s the root mean square of 1 - p(r,y_r); S is the root mean square of |g_r| (1 - p(r,y_r)) over all rows. D_r
are the columns that r drops, tail_r their mass, and q(v) a distribution over them, the block's means rounded to powers
of two and normalised. A row drops its own target only where |g_r| (1 - p(r,y_r)) <= eps S, so that all of it is
negligible: what follows is about the other rows.

1. Every dropped entry is small: `|dz(r,v)| <= eps * max(G s, S)` for v in D_r.
2. All of them together are small: `|dz - kept part of dz| <= sqrt(2 eps) |dz|` in the Frobenius norm for the whole
   batch, if upstream gradients are equal within a block (as those of a sequence are). That is 2.2 % at eps = 2^-12, for
   flat, peaked and adversarial logits alike. Proof: by 1. a row's squares sum to at most
   `eps (G s + S) |g_r| tail_r`, and tail_r <= 1 - p(r,y_r); summed over all rows, by Cauchy-Schwarz, that is at most
   `2 eps * sum_r |g_r|^2 (1 - p(r,y_r))^2`. Rows that drop their target add at most eps^2 to the 2 eps.
3. With the correction the kept dz_r changes by `e_r(v) = g_r (p(r,v) - tail_r q(v))` on D_r, so `sum_v e_r(v) = 0` and
   `|e_r| <= 2 |g_r| tail_r` in the sum of magnitudes; dH_r changes by e_r times the weight (and, in a head with a
   softcap, the difference of its derivatives at p(r,v) and at the mean).
4. The weight's gradient takes `-g_r` times the block's mean probability, as the screen has it, for each dropped entry
   of rows with |g_r| > eps S.

A block whose mean tail exceeds `tail_guard`, or that has more than half of its columns above `eps`, keeps everything:
what is flat is computed exactly. Saturated pairs, with their g_r far below S, keep hardly anything. On real hidden
states the correction leaves a fifth of the dropped gradient of the hidden states and half of the weight's (DESIGN.md).

Source of the idea to skip small softmax entries in the backward: Wijmans et al., 2024, Cut Your Losses in Large-
Vocabulary Language Models, arXiv 2411.09009, section 4.3 (whole tiles, threshold 2^-12, no correction).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_dpo.head import VocabShard
from fused_dpo.vocab_parallel.collectives import sum_over_ranks


class Filtering(NamedTuple):
    """How much the gradients may leave out; see `KernelOptions` for both numbers."""

    eps: float
    """0 leaves nothing out, and is the exact path."""
    tail_guard: float


EVERYTHING = 255
"""The exponent of a column that no threshold drops."""
BIAS = 127
"""Exponent e stands for probabilities in [2^(e-BIAS), 2^(e-BIAS+1))."""


def means_of_blocks(values: Tensor, block_of_row: Tensor, blocks: int) -> Tensor:
    """Average `values` [R] over each block of rows, [blocks]; `block_of_row` is int64 [R], ascending.

    Not by `scatter_reduce`, which adds in any order on CUDA: other last bits in a threshold keep other entries.
    """
    offsets = torch.searchsorted(block_of_row, torch.arange(blocks + 1, device=values.device))
    return torch.segment_reduce(values, "mean", offsets=offsets, unsafe=True)


class Judgement:
    """Judge what is dropped, now that the upstream gradients are known.

    With G the largest |upstream| in a block, s the root mean square of its rows' 1 - p of the target, and S that of
    |upstream| (1 - p) over all rows, an entry of the logits' gradient is dropped if for sure, that is by the upper end
    of its exponent, it is at most `eps * max(G s, S)`. Targets are kept, unless `|upstream| (1 - p) <= eps * S`.

    Args:
        block_of_row: int64 [R], ascending.
        blocks: how many there are.
        upstream: [R] gradients of the rows' log-probs.
        one_minus_p: [R] of the targets: the size of a row's gradient is about `upstream * one_minus_p`. Where that is
            not finite nothing is dropped.
        target: int64 [R], V where there is none.
        eps: the filter's threshold.
    """

    def __init__(
        self, block_of_row: Tensor, blocks: int, upstream: Tensor, one_minus_p: Tensor, target: Tensor, eps: float
    ) -> None:
        self.block_of_row, self.target = block_of_row, target
        self.magnitude = upstream.abs()
        # Rows without gradient are out of it, whatever their hidden states are.
        size = torch.where(upstream == 0, 0.0, (upstream * one_minus_p).abs())
        zeros = upstream.new_zeros(blocks)
        self.largest = zeros.scatter_reduce(0, block_of_row, self.magnitude, "amax")
        known = torch.where((upstream == 0) & ~one_minus_p.isfinite(), 0.0, one_minus_p)
        squares = means_of_blocks(known.square(), block_of_row, blocks)
        scale = size.square().mean().sqrt() if size.numel() else zeros.sum()
        scale = torch.where(scale.isfinite(), scale, torch.nan)  # and NaN is below no limit
        self.negligible = eps * scale
        self.smallest = torch.maximum(eps * self.largest * squares.sqrt(), self.negligible)
        self.judged = size > self.negligible

    def columns(self, screen: Tensor, shard: VocabShard | None = None) -> tuple[Tensor, Tensor]:
        """Choose the columns that each block keeps, bool [blocks, V], by a screen's exponents of the largest.

        Of more than half of the vocabulary all is kept: gathering it would cost more. Where it is split over ranks they
        tell each other how many they keep. Returned are also the blocks that keep all of it, bool [blocks].
        """
        limit = ((self.smallest / self.largest).log2() + (BIAS - 1)).floor().clamp(min=-1, max=BIAS)
        keep = screen >= (limit.nan_to_num(nan=-1.0) + 1).to(torch.uint8)[:, None]
        keep &= ~(self.largest <= self.negligible)[:, None]
        _keep_targets(keep, self.block_of_row, self.target, self.judged)
        # A few blocks at a time: sums of bool are taken in int64, eight times their size.
        counts = torch.cat([part.sum(1) for part in keep.split(16)]) if len(keep) else keep.new_zeros(0)
        everything = sum_over_ranks(counts, shard) > vocabulary_size(keep, shard) // 2
        keep |= everything[:, None]
        return keep, everything


def vocabulary_size(columns: Tensor, shard: VocabShard | None) -> int:
    """Tell the V of all ranks, given a tensor [..., V] of the columns here."""
    return columns.shape[-1] if shard is None else shard.size


def _keep_targets(keep: Tensor, row: Tensor, column: Tensor, judged: Tensor) -> None:
    """Set `keep[row, column]` where `judged`, without waiting for the device to tell how many those are."""
    flat = row * keep.shape[1] + column.clamp(0, keep.shape[1] - 1)
    judged = judged & (column >= 0) & (column < keep.shape[1])
    keep.view(torch.uint8).view(-1).scatter_reduce_(0, flat, judged.to(torch.uint8), "amax")
