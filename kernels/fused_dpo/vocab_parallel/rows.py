"""What the ranks know of each row's softmax, merged by one sum."""

import torch
from torch import Tensor

from fused_dpo.head import VocabShard
from fused_dpo.vocab_parallel.collectives import sum_over_ranks

_BITS = {4: torch.int32, 8: torch.int64}


def sums_of_ranks(parts: Tensor, picked: Tensor, shard: VocabShard | None) -> tuple[Tensor, Tensor]:
    """Sum integers [n, R] over the ranks, and find the target's logit [R], which one of them has; NaN on all others.

    In one call: of the logit the bits are summed, zeros where it is not.
    """
    if shard is None:
        return parts, picked
    found = ~picked.isnan()
    bits = picked.view(_BITS[picked.element_size()]).to(torch.int64).masked_fill_(~found, 0)
    sums = sum_over_ranks(torch.stack([*parts, bits, found.to(torch.int64)]), shard)
    picked = sums[-2].to(_BITS[picked.element_size()]).view(picked.dtype)
    return sums[:-2], picked.masked_fill(sums[-1] == 0, torch.nan)
