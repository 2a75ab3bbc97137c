"""Token pairs -> a padded batch, the layout that packing is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_dpo_engine.attention.call import Backend
from fused_dpo_engine.batching.batch import HeadCall, PairBatch, margins_and_rankings
from fused_dpo_engine.data.pairs import TokenPair

IGNORE_INDEX = -100
"""The label of what is not scored, as Hugging Face has it."""


@dataclass(frozen=True, kw_only=True)
class PaddedBatch(PairBatch):
    """Pairs as 2B rows of one width S, padded on the right. `input_ids` is int64 [2B, S]."""

    attention_mask: Tensor
    """int64 [2B, S], 1 where there is a token."""
    labels: Tensor
    """int64 [2B, S], IGNORE_INDEX in prompts and padding."""

    @property
    def offsets(self) -> Tensor:
        """int64 [2B+1]: every sequence has S rows."""
        rows, width = self.labels.shape
        return torch.arange(0, rows * width + 1, width, device=self.labels.device)

    def model_inputs(self, attention: Backend) -> dict[str, Any]:
        """Give tokens and mask; the model's own attention reads them."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def head_call(self, hidden: Tensor) -> HeadCall:
        """Return all rows, with the labels that tell which are scored."""
        return HeadCall(hidden, self.labels, {})

    def lay_out(self, values: Tensor, token_logps: Tensor) -> Tensor:
        """Put each value at the row that predicts its token, 0 elsewhere."""
        scored = torch.nn.functional.pad(self.labels[:, 1:] != IGNORE_INDEX, (0, 1))
        return torch.zeros_like(token_logps).masked_scatter(scored, values)


def pad(pairs: Sequence[TokenPair], indices: Sequence[int]) -> PaddedBatch:
    """Build the padded batch of `pairs[i] for i in indices`; padding is token 0, which nothing ever looks at."""
    chosen = [pairs[index] for index in indices]
    sequences = [side for pair in chosen for side in pair.sides]
    width = max(len(ids) for ids, _ in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORE_INDEX)
    for row, (ids, positions) in enumerate(sequences):
        tokens, scored = torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(positions)
        input_ids[row, : len(ids)] = tokens
        attention_mask[row, : len(ids)] = 1
        labels[row, scored] = tokens[scored]
    margins, rankings = margins_and_rankings(chosen)
    num_tokens = sum(pair.num_tokens for pair in chosen)
    lengths = [len(positions) for _, positions in sequences]
    return PaddedBatch(
        pair_indices=list(indices),
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        chosen_lengths=torch.tensor(lengths[0::2]),
        rejected_lengths=torch.tensor(lengths[1::2]),
        margins=margins,
        rankings=rankings,
        scored_lengths=lengths,
        num_tokens=num_tokens,
        num_padding=input_ids.numel() - num_tokens,
    )
