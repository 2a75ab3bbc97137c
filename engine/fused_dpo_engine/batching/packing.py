"""Token pairs -> one packed row without padding, what they share computed once; built on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_dpo_engine.attention.call import Backend
from fused_dpo_engine.attention.gather import gather_rows
from fused_dpo_engine.attention.plan import AttentionPlan, offsets_of, plan_attention
from fused_dpo_engine.batching.batch import HeadCall, PairBatch, margins_and_rankings
from fused_dpo_engine.batching.sharing import Placement, place_sequences, rows_of
from fused_dpo_engine.data.pairs import TokenPair


class Copies(NamedTuple):
    """Where sequences of a packed row are the same tokens: what the head scores, and who gets it. All on one device."""

    scored: Tensor
    """int64 [R'], the scored tokens, among all R, that the head is asked: those of the first of equal sequences."""
    cu_scored: Tensor
    """int32 [N+1], offsets of the N different sequences among those."""
    source: Tensor
    """int64 [R], where each of the scored tokens finds its value among the head's."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "Copies":
        """Move all three."""
        return Copies(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


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
    copies: Copies | None = None
    """None where all sequences differ."""

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
        rows, targets, offsets = self.scored_rows, self.targets, self.cu_scored
        if self.copies is not None:
            rows, targets, offsets = rows[self.copies.scored], targets[self.copies.scored], self.copies.cu_scored
        # All of them are scored; the head would wait for the device to find that out.
        every_row = torch.arange(len(targets), device=targets.device)
        settings = {"cu_seqlens": offsets, "shift": False, "row_index": every_row}
        return HeadCall(gather_rows(hidden[0], rows), targets, settings)

    def spread(self, values: Tensor) -> Tensor:
        """Give the tokens of equal sequences the same values."""
        return values if self.copies is None else gather_rows(values, self.copies.source)

    def lay_out(self, values: Tensor, token_logps: Tensor) -> Tensor:
        """Return the values themselves: the scored tokens are all that there is."""
        return values


def pack(pairs: Sequence[TokenPair], indices: Sequence[int], *, share: bool = True) -> PackedBatch:
    """Build the packed batch of `pairs[i] for i in indices`; the row before a response's first token predicts it.

    Args:
        pairs: all pairs.
        indices: at least one, none twice.
        share: compute the common beginning of the sequences on one prompt once, and equal sequences altogether.
    """
    placements = place_sequences(pairs, indices, share=share)
    segments, rows_of_each = rows_of(placements)
    scored: list[np.ndarray] = [np.empty(0)] * (2 * len(indices))
    targets = scored.copy()
    for placement, rows in zip(placements, rows_of_each, strict=True):
        _, positions = pairs[indices[placement.sequence // 2]].sides[placement.sequence % 2]
        for sequence in (placement.sequence, *placement.copies):
            scored[sequence] = rows[positions - 1]
            targets[sequence] = placement.ids[positions]

    lengths = [len(rows) for rows in scored]
    margins, rankings = margins_and_rankings([pairs[index] for index in indices])
    return PackedBatch(
        pair_indices=list(indices),
        input_ids=_tensor([placement.ids[placement.shared :] for placement in placements])[None],
        position_ids=_tensor([np.arange(p.shared, len(p.ids)) for p in placements])[None],
        scored_rows=_tensor(scored),
        targets=_tensor(targets),
        cu_scored=offsets_of(lengths),
        chosen_lengths=torch.tensor(lengths[0::2]),
        rejected_lengths=torch.tensor(lengths[1::2]),
        margins=margins,
        rankings=rankings,
        scored_lengths=lengths,
        attention=plan_attention(segments),
        copies=_copies(placements, lengths),
        num_tokens=sum(pairs[index].num_tokens for index in indices),
    )


def _copies(placements: Sequence[Placement], lengths: list[int]) -> Copies | None:
    """Tell the head's scored tokens from all, given how many each of the 2B sequences has."""
    if len(placements) == len(lengths):
        return None
    first = {sequence: placement.sequence for placement in placements for sequence in placement.copies}
    starts = np.cumsum([0, *lengths])
    different = [sequence for sequence in range(len(lengths)) if sequence not in first]
    own = [lengths[sequence] for sequence in different]
    places = dict(zip(different, np.cumsum([0, *own]).tolist(), strict=False))
    return Copies(
        _tensor([np.arange(starts[sequence], starts[sequence + 1]) for sequence in different]),
        offsets_of(own),
        _tensor([places[first.get(at, at)] + np.arange(length) for at, length in enumerate(lengths)]),
    )


def _tensor(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
