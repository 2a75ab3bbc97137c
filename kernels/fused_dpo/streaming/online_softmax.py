"""Log-softmax of rows whose logits come a tile of columns at a time (Milakov & Gimelshein, 2018, arXiv 1805.02867).

Each tile is summed up above a peak of its own, and nothing of it depends on the tiles around it. They are merged at the
end, by sums that come to the same bits in any order (`fused_dpo.linalg.fixed_point`): ranks that hold a part of the
vocabulary each find the log-probs of one process that holds all of it, if they cut it between two tiles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_dpo.head import VocabShard
from fused_dpo.linalg.fixed_point import from_fixed, to_fixed
from fused_dpo.linalg.operands import Buffer
from fused_dpo.stats import TokenStats
from fused_dpo.vocab_parallel.collectives import max_over_ranks, sum_over_ranks
from fused_dpo.vocab_parallel.rows import sums_of_ranks


@dataclass(frozen=True)
class Softmax:
    """What is known of the logits of some rows over the whole vocabulary."""

    values: Tensor
    """[3, rows], with stats [6, rows]: the properties, in their order."""

    @property
    def peak(self) -> Tensor:
        """Largest logit [rows]."""
        return self.values[0]

    @property
    def total(self) -> Tensor:
        """Sum of `exp(logit - peak)` [rows]."""
        return self.values[1]

    @property
    def picked(self) -> Tensor:
        """The target's logit [rows], NaN if there is no such column."""
        return self.values[2]

    def add_tail(self, span: slice, mass: Tensor) -> None:
        """Take in the sum of `exp(logit - peak)` [n] over columns not folded: none above `peak`, nor the target."""
        self.total[span] += mass

    def add_tail_stats(self, span: slice, z: Tensor, p: Tensor, unit: Tensor) -> None:
        """Take in the same columns for the stats: their logits `z` [n, columns], where `exp(z - peak)` is `unit * p`.

        `p` is [n, columns], `unit` [n].
        """
        weighted, plain, squares = self.values[3:]
        weighted[span] += unit * (p * z).sum(1)
        plain[span] += z.sum(1)
        squares[span] += unit.square() * p.square().sum(1)

    def logps(self) -> Tensor:
        """Compute the log-prob of the targets [rows]."""
        return self.picked - self.peak - self.total.log()

    def stats(self, V: int) -> TokenStats:
        """Compute the statistics of all rows over the V logits, each [rows]."""
        weighted, plain, squares = self.values[3:]
        return TokenStats(
            entropy=self.total.log() - (weighted / self.total - self.peak),
            mean_logit=plain / V,
            is_top1=(self.picked >= self.peak).to(self.peak.dtype),
            log_sum_sq_probs=(squares / self.total.square()).log(),
        )


class OnlineSoftmax:
    """Sums of the exponentials of some rows in each of `tiles` tiles, their target's logit, and what the stats need."""

    def __init__(self, tiles: int, rows: int, dtype: torch.dtype, device: torch.device, *, want_stats: bool) -> None:
        # Of each tile its peak, the sum of exp(logit - peak); for the stats that of exp(logit - peak) * logit, of the
        # logits, and of exp(logit - peak)^2.
        self._sums = torch.zeros(5 if want_stats else 2, tiles, rows, dtype=dtype, device=device)
        self._picked = torch.full((rows,), torch.nan, dtype=dtype, device=device)
        self._logits = Buffer()

    def fold(self, tile: int, z: Tensor, column: Tensor, inside: Tensor, span: slice) -> Tensor:
        """Take in a tile of logits `z` [n, columns] of the rows `span`; returns their largest [n].

        `column` [n, 1] is where each row's target is in the tile, if it is `inside` [n, 1]. Leaves `exp(z - largest)`
        in the place of `z`.
        """
        picked = torch.where(inside, z.gather(1, column), self._picked[span, None])
        self._picked[span] = picked.squeeze(1)
        peak = z.amax(1).clamp_(min=torch.finfo(z.dtype).min)  # a tile of -inf alone stays finite
        want_stats = len(self._sums) > 2
        logits = self._logits.like(z).copy_(z) if want_stats else None
        weights = shifted_exp(z, peak)
        sums = [peak, weights.sum(1)]
        if logits is not None:
            plain = logits.sum(1)
            logits.mul_(weights).masked_fill_(logits == -torch.inf, 0.0)
            sums += [logits.sum(1), plain, torch.mul(weights, weights, out=logits).sum(1)]
        for place, values in zip(self._sums, sums, strict=True):
            place[tile, span] = values
        return peak

    def merge(self, tiles: int, span: slice, shard: VocabShard | None = None) -> Softmax:
        """Merge the first `tiles` tiles of the rows `span`, and those of all ranks; forgets the targets' logits."""
        peaks, totals, *others = self._sums[:, :tiles, span]
        peak = max_over_ranks(peaks.amax(0), shard)
        total = to_fixed(torch.zeros_like(peak))
        stats = total.new_zeros(len(others), len(peak), dtype=peak.dtype)
        for tile in range(tiles):  # one after the other: nothing here is as large as all of them
            rescale = (peaks[tile] - peak).exp_()
            total += to_fixed(totals[tile] * rescale)
            if others:
                weighted, plain, squares = (values[tile] for values in others)
                stats += torch.stack((weighted * rescale, plain, squares * rescale.square()))
        total, picked = sums_of_ranks(total, self._picked[span], shard)
        merged = torch.stack((peak, from_fixed(total, peak.dtype), picked, *sum_over_ranks(stats, shard)))
        self._picked[span] = torch.nan
        return Softmax(merged)


def logits_gradient(
    z: Tensor,
    column: Tensor,
    inside: Tensor,
    peak: Tensor,
    total: Tensor,
    one_minus_p: Tensor,
    upstream: Tensor,
) -> Tensor:
    """Compute `upstream * (onehot(target) - exp(z - peak) / total)` of some columns, in the place of their logits `z`.

    Args:
        z: logits [n, columns].
        column, inside: int64 [n, 1] and bool [n, 1]: where a row's target is among the columns, if it is.
        peak, total, one_minus_p: [n] of the `SoftmaxState`: 1 - p from `z` would differ from it by the last bits.
        upstream: [n] gradients of the rows' log-probs.
    """
    dz = shifted_exp(z, peak).mul_(-(upstream / total)[:, None])
    at_target = (one_minus_p * upstream)[:, None]
    return dz.scatter_(1, column, torch.where(inside, at_target, dz.gather(1, column)))


def shifted_exp(z: Tensor, shift: Tensor) -> Tensor:
    """Compute `exp(z - shift)` in the place of `z`, with what would be near-subnormal lifted to a tiny number.

    Subnormal numbers cost ten times the time on a CPU (measured: 5 ns an element against 0.4), and 1e-26 of a
    probability is far below the rounding of the sum it goes into.
    """
    return z.sub_(shift[:, None]).clamp_(min=lowest_exponent(z.dtype)).exp_()


def lowest_exponent(dtype: torch.dtype) -> float:
    """Tell what `shifted_exp` lifts exponents to."""
    return -600.0 if dtype == torch.float64 else -60.0
