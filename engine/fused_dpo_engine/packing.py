"""Token pairs -> one packed row without padding, what they share computed once; built on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_dpo_engine.batches import PairBatch
from fused_dpo_engine.pairs import TokenPair
from fused_dpo_engine.sharing import place_sequences


class Segment(NamedTuple):
    """Rows of a packed row that attend causally to the first `shared` rows of their trunk, then to themselves."""

    start: int
    stop: int
    trunk: int
    """Which segment; itself where nothing is shared."""
    shared: int


@dataclass(eq=False)  # not frozen: of those torch 2.11 compiles in every field, and the segments with them
class AttentionPlan:
    """Who sees whom in a packed row of T tokens and N segments; handed to every attention layer of the model.

    A variable-length attention call with offsets of its own for queries and keys, causal and aligned bottom-right.
    """

    segments: tuple[Segment, ...]
    """In the order of the row, without gaps. What is compiled must not look at them: `torch.compile` would make it anew
    for every number of segments."""
    num_rows: int
    """T."""
    cu_q: Tensor = field(repr=False)
    """int32 [N+1], offsets of the segments' queries in the row."""
    cu_k: Tensor = field(repr=False)
    """int32 [N+1], offsets of the segments' keys among the gathered keys."""
    max_q: int
    """Queries of the longest segment."""
    max_k: int
    """Keys of the longest segment."""
    kv_index: Tensor | None = field(repr=False)
    """int64 [K], the row of each gathered key; None where nothing is shared, and the keys are the row itself."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "AttentionPlan":
        """The plan with its tensors on `device`."""
        cu_q, cu_k = (offsets.to(device, non_blocking=non_blocking) for offsets in (self.cu_q, self.cu_k))
        kv_index = None if self.kv_index is None else self.kv_index.to(device, non_blocking=non_blocking)
        return replace(self, cu_q=cu_q, cu_k=cu_k, kv_index=kv_index)


def plan_attention(segments: Sequence[Segment]) -> AttentionPlan:
    """The plan of at least one segment."""
    queries = [segment.stop - segment.start for segment in segments]
    keys = [length + segment.shared for length, segment in zip(queries, segments, strict=True)]
    kv_index = None
    if any(segment.shared for segment in segments):
        rows = []
        for start, stop, trunk, shared in segments:
            first = segments[trunk].start
            rows += [np.arange(first, first + shared), np.arange(start, stop)]
        kv_index = torch.from_numpy(np.concatenate(rows))
    offsets = _offsets(queries), _offsets(keys)
    return AttentionPlan(tuple(segments), sum(queries), *offsets, max(queries), max(keys), kv_index)


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
        cu_scored=_offsets(lengths),
        chosen_lengths=torch.tensor(lengths[0::2]),
        rejected_lengths=torch.tensor(lengths[1::2]),
        scored_lengths=lengths,
        attention=plan_attention(segments),
        num_tokens=sum(pairs[index].num_tokens for index in indices),
    )


def _tensor(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
