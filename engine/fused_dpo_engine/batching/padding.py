"""Token pairs -> a padded batch, the layout that packing is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fused_dpo_engine.batching.batch import PairBatch
from fused_dpo_engine.data.pairs import TokenPair

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class PaddedBatch(PairBatch):
    """Pairs as 2B rows of one width S, padded on the right. `input_ids` is int64 [2B, S]."""

    attention_mask: Tensor
    """int64 [2B, S], 1 where there is a token."""
    labels: Tensor
    """int64 [2B, S], -100 in prompts and padding."""


def pad(pairs: Sequence[TokenPair], indices: Sequence[int]) -> PaddedBatch:
    """Build the padded batch of `pairs[i] for i in indices`; padding is token 0, which nothing ever looks at."""
    chosen = [pairs[index] for index in indices]
    sequences = [(pair.prompt_length, ids) for pair in chosen for ids in (pair.chosen_ids, pair.rejected_ids)]
    width = max(len(ids) for _, ids in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
    for row, (prompt_length, ids) in enumerate(sequences):
        tokens = torch.from_numpy(ids.astype(np.int64))
        input_ids[row, : len(ids)] = tokens
        attention_mask[row, : len(ids)] = 1
        labels[row, prompt_length : len(ids)] = tokens[prompt_length:]
    num_tokens = sum(pair.num_tokens for pair in chosen)
    lengths = [len(ids) - prompt_length for prompt_length, ids in sequences]
    return PaddedBatch(
        pair_indices=list(indices),
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        chosen_lengths=torch.tensor(lengths[0::2]),
        rejected_lengths=torch.tensor(lengths[1::2]),
        scored_lengths=lengths,
        num_tokens=num_tokens,
        num_padding=input_ids.numel() - num_tokens,
    )
