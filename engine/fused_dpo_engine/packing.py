"""Token pairs -> packed micro-batches: one row of tokens without padding, planned and built on the host."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fused_dpo_engine.pairs import TokenPair


@dataclass(frozen=True)
class AttentionPlan:
    """Which stretches of a packed row attend to themselves; handed to every attention layer of the model."""

    segments: tuple[tuple[int, int], ...]
    """Start and end of each sequence in the packed row, in order and without gaps."""


@dataclass(frozen=True)
class PackedBatch:
    """Pairs side by side in one row: `[chosen 0 | rejected 0 | chosen 1 | rejected 1 | ...]`.

    T tokens, R scored rows, B pairs.
    """

    pair_indices: list[int]
    """Which pairs, in order."""
    input_ids: Tensor
    """int64 [1, T]."""
    position_ids: Tensor
    """int64 [1, T], counting from 0 in every sequence."""
    scored_rows: Tensor
    """int64 [R], rows of the packed hidden states that predict a response token."""
    targets: Tensor
    """int64 [R], the tokens that those rows predict."""
    cu_scored: Tensor
    """int32 [2B+1], offsets of the sequences among the scored rows."""
    chosen_lengths: Tensor
    """int64 [B], scored tokens of the chosen responses."""
    rejected_lengths: Tensor
    """int64 [B]."""
    attention: AttentionPlan = field(repr=False)

    @property
    def num_pairs(self) -> int:
        """B."""
        return len(self.pair_indices)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch with its tensors on `device`, copied without waiting where the device allows it."""
        moved = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return PackedBatch(**{**vars(self), **moved})


def pair_cost(pair: TokenPair) -> int:
    """Tokens that a pair takes in a packed row."""
    return len(pair.chosen_ids) + len(pair.rejected_ids)


def plan_batches(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Put items into as few batches of at most `budget` tokens as best-fit-decreasing finds.

    Deterministic: ties go to the earlier item. Batches come in the order of their first item's cost, items within a
    batch in ascending order.

    Args:
        costs: tokens of each item.
        budget: tokens a batch may hold.

    Returns:
        Lists of positions in `costs`.

    Raises:
        ValueError: an item alone is larger than the budget.

    Source:
        Johnson, 1973, Near-optimal bin packing algorithms; the sorted list of free space makes it O(n log n).
    """
    batches: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, batch), ascending
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost = costs[item]
        if cost > budget:
            raise ValueError(
                f"a pair of {cost} tokens does not fit into a batch of {budget}; raise tokens_per_batch or lower "
                f"max_length (a pair takes up to 2 x max_length)."
            )
        at = bisect_left(free, (cost, -1))
        if at < len(free):
            left, batch = free.pop(at)
        else:
            left, batch = budget, len(batches)
            batches.append([])
        batches[batch].append(item)
        insort(free, (left - cost, batch))
    return [sorted(batch) for batch in batches]


def pack(pairs: Sequence[TokenPair], indices: Sequence[int]) -> PackedBatch:
    """Build the packed batch of `pairs[i] for i in indices`; the row before a response's first token predicts it."""
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    scored: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    segments: list[tuple[int, int]] = []
    lengths: list[int] = []
    offset = 0
    for index in indices:
        pair = pairs[index]
        for ids in (pair.chosen_ids, pair.rejected_ids):
            first = pair.prompt_length
            tokens.append(ids)
            positions.append(np.arange(len(ids)))
            scored.append(np.arange(offset + first - 1, offset + len(ids) - 1))
            targets.append(ids[first:])
            segments.append((offset, offset + len(ids)))
            lengths.append(len(ids) - first)
            offset += len(ids)

    def tensor(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    scored_lengths = torch.tensor(lengths, dtype=torch.int64)
    return PackedBatch(
        pair_indices=list(indices),
        input_ids=tensor(tokens)[None],
        position_ids=tensor(positions)[None],
        scored_rows=tensor(scored),
        targets=tensor(targets),
        cu_scored=torch.cat((torch.zeros(1), scored_lengths.cumsum(0))).to(torch.int32),
        chosen_lengths=scored_lengths[0::2],
        rejected_lengths=scored_lengths[1::2],
        attention=AttentionPlan(tuple(segments)),
    )


def pack_all(pairs: Sequence[TokenPair], indices: Sequence[int], budget: int) -> list[PackedBatch]:
    """Pack the pairs at `indices` into batches of at most `budget` tokens each; a pair is never split."""
    plan = plan_batches([pair_cost(pairs[i]) for i in indices], budget)
    return [pack(pairs, [indices[i] for i in batch]) for batch in plan]
