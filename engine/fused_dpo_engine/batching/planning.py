"""Which pairs go into one forward pass: packed rows as full as they get, or padded batches in the order given."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fused_dpo_engine.batching.batch import PairBatch
from fused_dpo_engine.batching.packing import pack
from fused_dpo_engine.batching.padding import pad
from fused_dpo_engine.batching.sharing import place_sequences, shared_length
from fused_dpo_engine.config.options import PackingOptions
from fused_dpo_engine.data.pairs import TokenPair, prompt_groups, ranking_groups
from fused_dpo_engine.errors import UserError


class PlannedBatch(NamedTuple):
    """The pairs of one forward pass."""

    indices: list[int]
    slots: int
    """Token slots that it takes, at most the budget."""
    counted: bool = True
    """False if another rank has it too: computed, as ranks take part in every pass, and left out of all sums."""


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


def share_units(pairs: Sequence[TokenPair], indices: Sequence[int], budget: int) -> tuple[list[list[int]], list[int]]:
    """Find what stays together in a packed row, with the rows it takes: the pairs on a prompt, as far as they fit.

    A prompt with more pairs than `budget` tokens hold is cut into several units, each of which computes it anew. A
    ranking is not cut, and so may be a unit that is too large.

    Returns:
        (units, costs): lists of pair indices, and rows of each.
    """
    units: list[list[int]] = []
    costs: list[int] = []
    for group in prompt_groups(pairs, indices):
        if len(group) == 1:  # as on most prompts: nothing else to look for
            pair = pairs[group[0]]
            units.append(group)
            costs.append(pair.num_tokens - shared_length(pair.chosen_ids, pair.rejected_ids))
            continue
        unit: dict[bytes, np.ndarray] = {}  # its different sequences, the trunk first
        for ranking in ranking_groups(pairs, group):
            sides = {
                key: ids
                for index in ranking
                for key, (ids, _) in zip(pairs[index].keys, pairs[index].sides, strict=True)
            }
            if unit:
                cost = _rows_beside(next(iter(unit.values())), [ids for key, ids in sides.items() if key not in unit])
                if costs[-1] + cost <= budget:
                    units[-1] += ranking
                    costs[-1] += cost
                    unit |= sides
                    continue
            trunk, *branches = sides.values()
            units.append(ranking)
            costs.append(len(trunk) + _rows_beside(trunk, branches))
            unit = sides
    return units, costs


def _rows_beside(trunk: np.ndarray, branches: Sequence[np.ndarray]) -> int:
    return sum(len(ids) - shared_length(trunk, ids) for ids in branches)


def plan_packed(pairs: Sequence[TokenPair], indices: Sequence[int], budget: int, *, share: bool) -> list[PlannedBatch]:
    """Split the pairs at `indices` into packed rows of at most `budget` tokens; no pair and no ranking is split.

    Raises:
        ValueError: a pair alone is larger than the budget.
    """
    if share:
        units, costs = share_units(pairs, indices, budget)
    else:
        units = ranking_groups(pairs, indices)
        costs = [sum(pairs[index].num_tokens for index in unit) for unit in units]
    return [
        PlannedBatch([index for unit in batch for index in units[unit]], sum(costs[unit] for unit in batch))
        for batch in plan_batches(costs, budget)
    ]


def plan_padded(pairs: Sequence[TokenPair], indices: Sequence[int], budget: int) -> list[PlannedBatch]:
    """Split the pairs into padded batches of at most `budget` slots, one after the other as trainers do it.

    Raises:
        ValueError: a pair alone, or a ranking, is larger than the budget.
    """
    batches: list[PlannedBatch] = []
    width = 0
    for ranking in ranking_groups(pairs, indices):
        length = max(max(len(pairs[index].chosen_ids), len(pairs[index].rejected_ids)) for index in ranking)
        slots = 2 * len(ranking) * length
        if slots > budget:
            raise ValueError(
                f"a padded pair of {slots} tokens does not fit into a batch of {budget}; raise tokens_per_batch "
                f"or lower max_length (a pair takes up to 2 x max_length)."
            )
        together = [*batches[-1].indices, *ranking] if batches else ranking
        if batches and 2 * len(together) * max(width, length) <= budget:
            width = max(width, length)
            batches[-1] = PlannedBatch(together, 2 * len(together) * width)
        else:
            width = length
            batches.append(PlannedBatch(ranking, slots))
    return batches


def check_rankings(pairs: Sequence[TokenPair], options: PackingOptions) -> None:
    """Find out, before a model is loaded, whether every ranking fits into a forward pass.

    Raises:
        UserError: one does not; names its row and what it takes.
    """
    for ranking in ranking_groups(pairs, range(len(pairs))):
        slots = count_slots(pairs, ranking, options) if len(ranking) > 1 else 0
        if slots > options.tokens_per_batch:
            way_out = "" if options.packing and options.prefix_sharing else ", pack and share prefixes"
            raise UserError(
                f"{pairs[ranking[0]].where}: its {len(ranking) + 1} answers are ranked together and take {slots} "
                f"tokens, more than tokens-per-batch = {options.tokens_per_batch}; raise it, lower "
                f"--max-length{way_out}, or take a loss of pairs."
            )


def plan_pairs(pairs: Sequence[TokenPair], indices: Sequence[int], options: PackingOptions) -> list[PlannedBatch]:
    """Split the pairs at `indices` into forward passes as the options say."""
    if not options.packing:
        return plan_padded(pairs, indices, options.tokens_per_batch)
    return plan_packed(pairs, indices, options.tokens_per_batch, share=options.prefix_sharing)


def count_rows(pairs: Sequence[TokenPair], batch: PlannedBatch, options: PackingOptions) -> int:
    """Count the rows of a forward pass that hold a token."""
    return batch.slots if options.packing else sum(pairs[index].num_tokens for index in batch.indices)


def spread_evenly(
    pairs: Sequence[TokenPair], batches: Sequence[PlannedBatch], options: PackingOptions, num_ranks: int
) -> list[PlannedBatch]:
    """Split the batches of most pairs in two until every rank gets as many batches; rankings stay whole.

    Where there are too few pairs, or rankings, the smallest batch is there again, not `counted`.
    """
    batches = list(batches)
    while len(batches) % num_ranks:
        largest = max(range(len(batches)), key=lambda at: len(ranking_groups(pairs, batches[at].indices)))
        halves = halve(pairs, batches[largest], options)
        if len(halves) == 1:
            again = min(batches, key=lambda batch: batch.slots)._replace(counted=False)
            return batches + [again] * (-len(batches) % num_ranks)
        batches[largest : largest + 1] = halves
    return batches


def halve(pairs: Sequence[TokenPair], batch: PlannedBatch, options: PackingOptions) -> list[PlannedBatch]:
    """Split a batch in two of as many rankings, or pairs, each.

    Returns:
        Both, or the batch alone where it holds a single one.
    """
    rankings = ranking_groups(pairs, batch.indices)
    if len(rankings) == 1:
        return [batch]
    half = len(rankings) // 2
    sides = [[index for ranking in side for index in ranking] for side in (rankings[:half], rankings[half:])]
    return [batch._replace(indices=side, slots=count_slots(pairs, side, options)) for side in sides]


def build_batch(pairs: Sequence[TokenPair], indices: Sequence[int], options: PackingOptions) -> PairBatch:
    """Lay out the pairs at `indices` for one forward pass as the options say."""
    return pack(pairs, indices, share=options.prefix_sharing) if options.packing else pad(pairs, indices)


def count_slots(pairs: Sequence[TokenPair], indices: Sequence[int], options: PackingOptions) -> int:
    """Count the token slots of a forward pass over the pairs at `indices`."""
    if options.packing:
        return sum(placement.num_rows for placement in place_sequences(pairs, indices, share=options.prefix_sharing))
    return 2 * len(indices) * max(max(len(pairs[i].chosen_ids), len(pairs[i].rejected_ids)) for i in indices)
