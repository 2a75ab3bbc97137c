"""Per-token quantities beside the log-prob."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """What the softmax of each row looks like; 0 where a row is not scored, never differentiated."""

    entropy: Tensor
    """Entropy of the row's distribution in nats."""
    mean_logit: Tensor
    """Mean of the row's V logits."""
    is_top1: Tensor
    """1.0 where no token is likelier than the target, so for every one of several equal maxima, else 0.0."""
    log_sum_sq_probs: Tensor
    """`log sum_v p_v^2` of the row's distribution in nats, from -log V to 0: that of the sum of `exp(logit - peak)^2`
    over the square of the sum of `exp(logit - peak)`. No rounding makes it positive: no term of the first sum is above
    its like in the second, and that is at least 1."""


@dataclass(frozen=True)
class SoftmaxState:
    """What a forward leaves for the backward, and for the stats, of each row's softmax; 0 where a row is not scored.

    A largest logit and a sum, instead of their log-sum-exp: beside an offset that all logits share, one number would
    lose the digits in which they differ.
    """

    values: Tensor
    """[3, T] in the accumulation dtype, or [5, T] with a filter: the properties, in their order."""

    @property
    def peak(self) -> Tensor:
        """Largest logit [T]."""
        return self.values[0]

    @property
    def total(self) -> Tensor:
        """Sum of `exp(logit - peak)` over the vocabulary [T]."""
        return self.values[1]

    @property
    def one_minus_p(self) -> Tensor:
        """1 - p of the target [T]: from p itself it would lose its relative precision where p is close to 1."""
        return self.values[2]

    @property
    def tail(self) -> Tensor:
        """Probability of the small tokens [T], see `FilterStats`."""
        return self.values[3]

    @property
    def kept_fraction(self) -> Tensor:
        """Fraction of the vocabulary that is kept [T], see `FilterStats`."""
        return self.values[4]

    def of(self, rows: slice | Tensor) -> "SoftmaxState":
        """Take the state of some rows."""
        return SoftmaxState(self.values[:, rows])


class FilterStats(NamedTuple):
    """What the filter saw of each row's distribution in the forward; 0 where a row is not scored."""

    tail: Tensor
    """Probability of the tokens that are small, at most `filter_eps`, summed over them; 0 in a block that is computed
    exactly. On a CPU a token is small if it is so in every row of the block, targets aside. On CUDA it is small if it
    is so in the row itself, by an upper bound on its probability: more tokens count, each with what it has."""
    kept_fraction: Tensor
    """Fraction of the vocabulary that some row gives more, targets and token 0 included. 1 in a block that is computed
    exactly."""
