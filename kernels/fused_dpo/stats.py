"""Per-token quantities beside the log-prob."""

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """What the softmax of each row looks like; 0 where a row is not scored, never differentiated."""

    entropy: Tensor
    """Entropy of the row's distribution in nats."""
    mean_logit: Tensor
    """Mean of the row's V logits."""
    is_top1: Tensor
    """1.0 where no token is likelier than the target, else 0.0."""


class FilterStats(NamedTuple):
    """What the filter saw of each row's distribution in the forward; 0 where a row is not scored."""

    tail: Tensor
    """Mass of the tokens that no row of the block gives more than `filter_eps`, targets aside (on CUDA: of those that
    the row itself does not, as far as it is known in time). 0 in a block that is computed exactly."""
    kept_fraction: Tensor
    """Fraction of the vocabulary that some row gives more, targets and token 0 included. 1 in a block that is computed
    exactly."""
