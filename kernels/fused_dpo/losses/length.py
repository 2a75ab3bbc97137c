"""Weights of tokens by length: LD-DPO."""

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor


def desensitized_weights(
    chosen_lengths: Sequence[int] | Tensor, rejected_lengths: Sequence[int] | Tensor, alpha: float
) -> Tensor:
    """Compute LD-DPO's weights of tokens: what a response has beyond the other one's length counts alpha.

    `weight[t] = 1 if t < min(chosen_length, rejected_length) else alpha`

    Args:
        chosen_lengths, rejected_lengths: `[B]` scored tokens, integers on the host.
        alpha: in [0, 1]; 1 is plain DPO, 0 drops the excess.

    Returns:
        fp32 CPU tensor `[sum of lengths]`, in packed order chosen_0, rejected_0, chosen_1, rejected_1, ...

    Raises:
        ValueError: alpha is out of range, or the lengths are not equally many or negative. TypeError: not integers.

    Source: Liu et al. 2024, "Length Desensitization in Direct Preference Optimization", arXiv:2409.06411.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}; 1 is plain DPO")
    chosen, rejected = [index(length) for length in chosen_lengths], [index(length) for length in rejected_lengths]
    if len(chosen) != len(rejected) or min(chosen + rejected, default=0) < 0:
        raise ValueError(
            f"chosen_lengths and rejected_lengths must hold one length >= 0 per response, got {chosen} and {rejected}"
        )
    weights: list[float] = []
    for pair in zip(chosen, rejected, strict=True):
        for length in pair:
            weights += [1.0] * min(pair) + [alpha] * (length - min(pair))
    return torch.tensor(weights, dtype=torch.float32)
