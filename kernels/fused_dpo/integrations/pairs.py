"""What trainers make of token log-probs: sums and means over the responses of pairs.

Everything is [N, S], chosen sequences first, then as many rejected ones. Entry i belongs to the token that position i
predicts, as `Scored` has it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_dpo.integrations.scoring import IGNORE_INDEX


def scored_mask(labels: Tensor) -> Tensor:
    """Tell which positions predict a scored token, bool [N, S], from labels that are not shifted."""
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))


def totals(logps: Tensor) -> Tensor:
    """Sum each sequence [N], in float64, rounded once."""
    return logps.sum(1, dtype=torch.float64).to(logps.dtype)


def mean_of(values: Tensor, mask: Tensor) -> Tensor:
    """Take the mean [] of the values under a mask; NaN if there are none."""
    return (values * mask).sum(dtype=torch.float64).div(mask.sum()).to(values.dtype)


def desensitized(logps: Tensor, lengths: Tensor, place: Tensor, alpha: float) -> Tensor:
    """Sum each sequence [N], with a factor on tokens that its partner is too short to have.

    Args:
        logps: [N, S], 0 where nothing is scored.
        lengths: int [N], tokens of each response.
        place: int [N, S] or [1, S], the number of each token, from 0, in what its trainer takes for the response.
        alpha: factor on the tokens from the length of the pair's shorter response on.

    Source:
        Liu et al., 2024, Length Desensitization in Direct Preference Optimization, arXiv 2409.06411.
    """
    shorter = lengths.view(2, -1).amin(0).repeat(2)
    return totals(torch.where(place < shorter[:, None], logps, alpha * logps))
