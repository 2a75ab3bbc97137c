"""What filtered gradients do about the columns that they drop: the block's mean probability stands for each row's own.

The forward notes, for each block of rows and each column, the exponent of the mean probability that the rows give it.
Of dropped columns this is all that is known, and enough: on real hidden states, whole means or the logits of a mean
hidden state in their place make the corrected gradients no better (measured).
"""

import torch
from torch import Tensor

from fused_dpo.linalg.matmul import accumulate_product, matmul_precision
from fused_dpo.linalg.operands import Operands
from fused_dpo.linalg.sizes import even_bounds
from fused_dpo.vocab_parallel.collectives import sum_over_ranks


class DroppedMeans:
    """Mean probabilities of the columns that each block of rows drops.

    Args:
        operands: of the rows.
        means: uint8 [blocks, V], exponents of the mean probabilities (see `fused_dpo.filtering`).
        keep: bool [blocks, V].
        offset: [blocks], mean log-sum-exp of a block's rows: where the logits of its probabilities are.
    """

    def __init__(self, operands: Operands, means: Tensor, keep: Tensor, offset: Tensor) -> None:
        self.operands, self.means, self.keep, self.offset = operands, means, keep, offset
        everything = [_powers(part).sum(1, dtype=torch.float64) for part in means.split(16)]
        total = torch.cat(everything) if everything else means.new_zeros(0).double()
        tiny = torch.finfo(torch.float32).tiny
        self._unit = 1.0 / sum_over_ranks(total, operands.shard).float().clamp(min=tiny)

    def columns(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Give what columns `first:stop` drop, [blocks, stop - first]: probabilities, and gradients of the product.

        A gradient is the probability times the derivative of what happens to the logits, as these are at that
        probability.
        """
        p = (_powers(self.means[:, first:stop]) * self._unit[:, None]).masked_fill_(self.keep[:, first:stop], 0.0)
        p = p.to(self.operands.acc_dtype)
        z = p.clamp(min=torch.finfo(torch.float32).tiny).log_().add_(self.offset[:, None])
        return p, self.operands.through_logits(p.clone(), z)

    def spread(self, width: int, buffer: Tensor) -> Tensor:
        """Compute `q @ weight` of every block [blocks, K], over the columns here.

        q is what the block drops, its probabilities divided by their sum on all ranks; 0 if it drops nothing.

        Takes `width` columns at a time, and holds six times `width * blocks` numbers. `buffer` [width or more, K] is
        for operands.
        """
        operands = self.operands
        total = self.offset.new_zeros(len(self.offset))
        spread = self.offset.new_zeros(len(self.offset), operands.width)
        for start, stop in even_bounds(operands.V, width):
            p, dz = self.columns(start, stop)
            total += p.sum(1)
            with matmul_precision(operands.dtype):
                accumulate_product(spread, dz, operands.weight_slice(slice(start, stop), buffer))
        sum_over_ranks(total, operands.shard)
        return spread / torch.where(total > 0, total, 1.0)[:, None]


def _powers(exponents: Tensor) -> Tensor:
    """Raise 2 to biased exponents; the smallest exponent gives 0, and so does that of what is not finite."""
    bits = exponents.to(torch.int32) << 23
    return bits.masked_fill_(exponents == 255, 0).view(torch.float32)
