"""Token pairs -> one packed row without padding, what they share computed once; built on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fused_dpo_engine.attention.interface.plan import AttentionPlan, Segment, offsets_of, plan_attention
from fused_dpo_engine.batching.batch import PairBatch
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
        first = pairs[indices[placement.sequence // 2]].prompt_length
        scored[placement.sequence] = rows[first - 1 : -1]
        targets[placement.sequence] = placement.ids[first:]

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
