"""Log-softmax of rows whose logits come a tile of columns at a time (Milakov & Gimelshein, 2018, arXiv 1805.02867)."""

import torch
from torch import Tensor

from fused_dpo.linalg.operands import Buffer
from fused_dpo.stats import TokenStats


class OnlineSoftmax:
    """Running maximum and sum of exponentials of some rows, their target's logit, and what the stats need.

    Attributes:
        peak: largest logit so far [rows].
        total: sum of `exp(logit - peak)` so far [rows].
        picked: the target's logit [rows], NaN until it has passed.
    """

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device, *, want_stats: bool) -> None:
        self.peak = torch.full((rows,), -torch.inf, dtype=dtype, device=device)
        self.total = torch.zeros_like(self.peak)
        self.picked = torch.full_like(self.peak, torch.nan)
        self._want_stats = want_stats
        self._logits = Buffer()
        self._sum = torch.zeros_like(self.peak)  # of the logits
        self._weighted = torch.zeros_like(self.peak)  # of exp(logit - peak) * logit
        self._squares = torch.zeros_like(self.peak)  # of exp(logit - peak)^2

    def fold(self, z: Tensor, column: Tensor, inside: Tensor, span: slice) -> Tensor:
        """Take in one tile of logits `z` [n, columns] of the rows `span`; returns their `peak` [n] as it is then.

        `column` [n, 1] is where each row's target is in the tile, if it is `inside` [n, 1]. Leaves `exp(z - peak)` in
        the place of `z`.
        """
        picked = torch.where(inside, z.gather(1, column), self.picked[span, None])
        self.picked[span] = picked.squeeze(1)
        lowest = torch.finfo(z.dtype).min
        new_peak = torch.maximum(self.peak[span], z.amax(1)).clamp_(min=lowest)  # a tile of -inf alone stays finite
        rescale = (self.peak[span] - new_peak).exp_()
        logits = self._logits.like(z).copy_(z) if self._want_stats else None
        weights = shifted_exp(z, new_peak)
        self.total[span] = self.total[span] * rescale + weights.sum(1)
        if logits is not None:
            self._sum[span] += logits.sum(1)
            logits.mul_(weights).masked_fill_(logits == -torch.inf, 0.0)
            self._weighted[span] = self._weighted[span] * rescale + logits.sum(1)
            squares = torch.mul(weights, weights, out=logits)
            self._squares[span] = self._squares[span] * rescale.square() + squares.sum(1)
        self.peak[span] = new_peak
        return new_peak

    def add_tail(self, span: slice, mass: Tensor) -> None:
        """Take in the sum of `exp(logit - peak)` [n] over columns not folded: none above `peak`, nor the target."""
        self.total[span] += mass

    def add_tail_stats(self, span: slice, z: Tensor, p: Tensor, unit: Tensor) -> None:
        """Take in the same columns for the stats: their logits `z` [n, columns], where `exp(z - peak)` is `unit * p`.

        `p` is [n, columns], `unit` [n].
        """
        self._weighted[span] += unit * (p * z).sum(1)
        self._sum[span] += z.sum(1)
        self._squares[span] += unit.square() * p.square().sum(1)

    def logps(self) -> Tensor:
        """Compute the log-prob of the targets [rows]."""
        return self.picked - self.peak - self.total.log()

    def stats(self, V: int) -> TokenStats:
        """Compute the statistics of all rows over the V logits, each [rows]."""
        return TokenStats(
            entropy=self.total.log() - (self._weighted / self.total - self.peak),
            mean_logit=self._sum / V,
            is_top1=(self.picked >= self.peak).to(self.peak.dtype),
            log_sum_sq_probs=(self._squares / self.total.square()).log(),
        )


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
