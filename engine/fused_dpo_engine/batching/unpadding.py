"""A batch of another trainer -> one packed row without padding, what its sequences share computed once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fused_dpo_engine.attention.plan import AttentionPlan, offsets_of, plan_attention
from fused_dpo_engine.batching.padding import IGNORE_INDEX
from fused_dpo_engine.batching.sharing import Member, place_groups, rows_of


@dataclass(frozen=True, kw_only=True)
class UnpaddedBatch:
    """The tokens of a batch [N, S] in one row of T tokens, of which R are scored."""

    input_ids: Tensor
    """int64 [1, T]."""
    position_ids: Tensor
    """int64 [1, T], each token's position in its own sequence."""
    attention: AttentionPlan = field(repr=False)
    scored_rows: Tensor
    """int64 [R], rows that predict a scored token, once for each sequence that has it."""
    targets: Tensor
    """int64 [R], the tokens that those rows predict."""
    cu_scored: Tensor
    """int32, offsets of the sequences among the scored rows."""
    scored_slots: Tensor
    """int64 [R], slots of the flattened batch [N * S] that hold the tokens whose rows these are."""
    row_of_slot: Tensor
    """int64 [N * S], the row of each slot's token; 0 where there is padding."""

    def to(self, device: torch.device) -> "UnpaddedBatch":
        """Move the tensors to `device`, without waiting where the device allows it."""
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items()}
        return UnpaddedBatch(**moved)


def unpad(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, *, share: bool = True) -> UnpaddedBatch:
    """Pack a padded batch. Its tensors are read on the host, so on a device this waits for them.

    Args:
        input_ids: int [N, S].
        attention_mask: [N, S], 1 where there is a token, those of a sequence next to each other, on whatever side the
            padding is; None if there is none.
        labels: int [N, S], not shifted: the token itself where it is scored, IGNORE_INDEX elsewhere. The first token of
            a sequence is never scored, as nothing predicts it.
        share: compute the common beginning of sequences with the same prompt, the tokens before the first scored one,
            once, and equal sequences altogether.

    Raises:
        ValueError: shapes differ, a sequence has gaps, or padding is scored.
    """
    mask = np.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.cpu().numpy() != 0
    if mask.ndim != 2 or not input_ids.shape == labels.shape == mask.shape:
        raise ValueError(
            f"input_ids, attention_mask and labels must have the same shape [N, S], got {list(input_ids.shape)}, "
            f"{list(mask.shape)} and {list(labels.shape)}."
        )
    width = mask.shape[1]
    first, count = mask.argmax(1), mask.sum(1)
    gaps = np.flatnonzero((mask & (np.arange(width) >= (first + count)[:, None])).any(1))
    if len(gaps):
        raise ValueError(f"attention_mask has gaps within sequence {gaps[0]}; tokens of a sequence follow each other.")
    starts = np.arange(len(mask)) * width + first
    return _pack(input_ids, labels, zip(starts.tolist(), (starts + count).tolist(), strict=True), share)


def repack(input_ids: Tensor, starts: Sequence[int], labels: Tensor, *, share: bool = True) -> UnpaddedBatch:
    """Pack sequences that lie in one row already, so that what they share is computed once.

    Args:
        input_ids: int [1, T].
        starts: where each sequence begins, ascending from 0.
        labels: int [1, T], see `unpad`; what stands at a sequence's first token is not looked at.
        share: see `unpad`.

    Raises:
        ValueError: shapes differ, or the sequences do not cover the row.
    """
    total = input_ids.numel()
    bounds = [*starts, total]
    if input_ids.shape != labels.shape or input_ids.shape[0] != 1:
        raise ValueError(
            f"input_ids and labels must have the same shape [1, T], got {list(input_ids.shape)} and "
            f"{list(labels.shape)}."
        )
    if bounds[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
        raise ValueError(f"sequences must begin at 0 and have tokens, got starts {bounds[:-1]} of {total} tokens.")
    return _pack(input_ids, labels, pairwise(bounds), share)


def _pack(input_ids: Tensor, labels: Tensor, spans: Iterable[tuple[int, int]], share: bool) -> UnpaddedBatch:
    """Pack the sequences that lie in `spans` (start, stop) of the flattened batch; empty ones are left out."""
    ids = input_ids.flatten().cpu().numpy().astype(np.int32)
    wanted = labels.flatten().cpu().numpy()
    spans = [(start, stop) for start, stop in spans if stop > start]
    if not spans:
        raise ValueError("the batch has no tokens.")
    sequences: list[Member] = []
    scored: list[np.ndarray] = []
    """Positions of the scored tokens of each sequence."""
    inside = np.zeros(len(ids), bool)
    for number, (start, stop) in enumerate(spans):
        inside[start:stop] = True
        positions = np.flatnonzero(wanted[start + 1 : stop] != IGNORE_INDEX) + 1
        scored.append(positions)
        sequences.append(Member(number, ids[start:stop], ids[start:stop].tobytes() + positions.tobytes()))
    outside = np.flatnonzero(~inside & (wanted != IGNORE_INDEX))
    if len(outside):
        where = divmod(int(outside[0]), input_ids.shape[-1])
        raise ValueError(f"labels{list(where)} is scored, but lies in padding; set labels to {IGNORE_INDEX} there.")

    placements = place_groups(_groups(sequences, scored) if share else [[member] for member in sequences])
    segments, rows_of_each = rows_of(placements)
    rows, targets, slots = ([np.empty(0, np.int64)] * len(spans) for _ in range(3))
    row_of_slot = np.zeros(len(ids), np.int64)
    for placement, own in zip(placements, rows_of_each, strict=True):
        for number in (placement.sequence, *placement.copies):
            start, stop = spans[number]
            row_of_slot[start:stop] = own
            rows[number] = own[scored[number] - 1]
            slots[number] = start + scored[number]
            targets[number] = wanted[slots[number]]
    return UnpaddedBatch(
        input_ids=_tensor([p.ids[p.shared :] for p in placements])[None],
        position_ids=_tensor([np.arange(p.shared, len(p.ids)) for p in placements])[None],
        attention=plan_attention(segments),
        scored_rows=_tensor(rows),
        targets=_tensor(targets),
        cu_scored=offsets_of([len(each) for each in rows]),
        scored_slots=_tensor(slots),
        row_of_slot=torch.from_numpy(row_of_slot),
    )


def _groups(sequences: Sequence[Member], scored: Sequence[np.ndarray]) -> list[list[Member]]:
    """Group the sequences with the same tokens before their first scored one, groups and members in the order given."""
    groups: dict[bytes, list[Member]] = {}
    for member, positions in zip(sequences, scored, strict=True):
        prompt = member.ids[: positions[0]] if len(positions) else member.ids
        groups.setdefault(prompt.tobytes(), []).append(member)
    return list(groups.values())


def _tensor(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
