"""Token pairs -> one packed row without padding, what they share computed once; built on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_dpo_engine.attention.call import Backend
from fused_dpo_engine.attention.gather import gather_rows
from fused_dpo_engine.attention.plan import AttentionPlan, Segment, offsets_of, plan_attention
from fused_dpo_engine.batching.batch import HeadCall, PairBatch
from fused_dpo_engine.batching.sharing import place_sequences
from fused_dpo_engine.data.pairs import TokenPair


@dataclass(frozen=True, kw_only=True)
class PackedBatch(PairBatch):
    """Pairs in one row, `[prompt 0 + chosen 0 | rejected 0 | prompt 1 + chosen 1 | rejected 1 | ...]`.

    T rows, R scored tokens, B pairs. `input_ids` is int64 [1, T].
    """

    position_ids: Tensor
    """int64 [1, T], each token's position in its own sequence."""
    scored_rows: Tensor
    """int64 [R], rows of the packed hidden states that predict a response token. A row that several sequences share
    stands there once for each: the last shared row predicts the first token of each branch."""
    targets: Tensor
    """int64 [R], the tokens that those rows predict."""
    cu_scored: Tensor
    """int32 [2B+1], offsets of the sequences among the scored rows, in the order of the pairs."""
    attention: AttentionPlan = field(repr=False)

    @property
    def offsets(self) -> Tensor:
        """int64 [2B+1], `cu_scored`."""
        return self.cu_scored.long()

    def model_inputs(self, attention: Backend) -> dict[str, Any]:
        """Give the row, its positions, and the plan in the place of a mask."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": None,
            "fused_dpo_plan": self.attention,
            "fused_dpo_backend": attention,
        }

    def head_call(self, hidden: Tensor) -> HeadCall:
        """Gather the rows that predict a response, which are known on the host: nothing else reaches the head."""
        # All of them are scored; the head would wait for the device to find that out.
        every_row = torch.arange(len(self.targets), device=self.targets.device)
        settings = {"cu_seqlens": self.cu_scored, "shift": False, "row_index": every_row}
        return HeadCall(gather_rows(hidden[0], self.scored_rows), self.targets, settings)

    def lay_out(self, values: Tensor, token_logps: Tensor) -> Tensor:
        """Return the values themselves: the scored tokens are all that there is."""
        return values


def pack(pairs: Sequence[TokenPair], indices: Sequence[int], *, share: bool = True) -> PackedBatch:
    """Build the packed batch of `pairs[i] for i in indices`; the row before a response's first token predicts it.

    Args:
        pairs: all pairs.
        indices: at least one, none twice.
        share: compute the common beginning of the sequences on one prompt once.
    """
    placements = place_sequences(pairs, indices, share=share)
    segments: list[Segment] = []
    scored: list[np.ndarray] = [np.empty(0)] * len(placements)
    targets = scored.copy()
    stop = 0
    for placement in placements:
        start, stop = stop, stop + placement.num_rows
        segments.append(Segment(start, stop, placement.trunk, placement.shared))
        trunk = segments[placement.trunk].start
        # The row of every position of the sequence: in its trunk as far as they go together, then its own.
        rows = np.concatenate((np.arange(trunk, trunk + placement.shared), np.arange(start, stop)))
        ids, positions = pairs[indices[placement.sequence // 2]].sides[placement.sequence % 2]
        scored[placement.sequence] = rows[positions - 1]
        targets[placement.sequence] = ids[positions]

    lengths = [len(rows) for rows in scored]
    return PackedBatch(
        pair_indices=list(indices),
        input_ids=_tensor([placement.ids[placement.shared :] for placement in placements])[None],
        position_ids=_tensor([np.arange(p.shared, len(p.ids)) for p in placements])[None],
        scored_rows=_tensor(scored),
        targets=_tensor(targets),
        cu_scored=offsets_of(lengths),
        chosen_lengths=torch.tensor(lengths[0::2]),
        rejected_lengths=torch.tensor(lengths[1::2]),
        scored_lengths=lengths,
        attention=plan_attention(segments),
        num_tokens=sum(pairs[index].num_tokens for index in indices),
    )


def _tensor(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
