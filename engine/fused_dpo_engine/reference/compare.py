"""Log-probs that were computed elsewhere, held against the model that they are said to be of."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_dpo_engine.batching.planning import build_batch, count_slots, plan_pairs
from fused_dpo_engine.config.options import PackingOptions
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.policy import Policy

STORED = {4: 1e-3, 2: 0.3}
"""By how much a stored log-prob may differ from the same model's in another forward pass: nat times the square root of
its tokens, by bytes of the dtype that is computed in. DESIGN.md has what was measured."""
BROUGHT = 0.5
"""The same of log-probs that data brings, which may come from logits in bf16."""


class Difference(NamedTuple):
    """A sequence's log-prob, then and now."""

    where: str
    before: float
    now: float
    tokens: int

    @property
    def size(self) -> float:
        """How far they are apart, in nat; infinite where one is no number."""
        apart = abs(self.now - self.before)
        return math.inf if math.isnan(apart) else apart

    @property
    def scaled(self) -> float:
        """How far they are apart, by the square root of the tokens: their errors add up like a random walk."""
        return self.size / math.sqrt(self.tokens)

    def __str__(self) -> str:
        return f"{self.where}: {self.before:.4f}, computed again {self.now:.4f} ({self.tokens} tokens)"


@torch.no_grad()
def score_again(
    policy: Policy, pairs: Sequence[TokenPair], indices: Sequence[int], known: Tensor, packing: PackingOptions
) -> dict[tuple[int, int], Difference]:
    """Score some pairs by the reference, and compare.

    Ranks that hold a model together have to call it with the same pairs.

    Args:
        policy: see `score_reference`.
        pairs: all pairs.
        indices: those to score.
        known: fp32 [pairs, 2], their log-probs; NaN where there are none.
        packing: how they are laid out.

    Returns:
        A difference by index and side (0 chosen, 1 rejected), where there is something to compare.
    """
    differences: dict[tuple[int, int], Difference] = {}
    with policy.as_reference():
        for planned in plan_pairs(pairs, indices, packing):
            batch = build_batch(pairs, planned.indices, packing)
            logps = policy(batch.to(policy.device)).logps.view(-1, 2).tolist()
            for index, now in zip(batch.pair_indices, logps, strict=True):
                pair = pairs[index]
                lengths = (pair.chosen_length, pair.rejected_length)
                for side, before in enumerate(known[index].tolist()):
                    if before == before:
                        differences[index, side] = Difference(pair.where, before, now[side], lengths[side])
    return differences


def first_that_fit(
    pairs: Sequence[TokenPair], indices: Sequence[int], count: int, packing: PackingOptions
) -> list[int]:
    """Take up to `count` pairs from the beginning, no more than one forward pass holds, and at least one."""
    taken: list[int] = []
    for index in indices[:count]:
        if taken and count_slots(pairs, [*taken, index], packing) > packing.tokens_per_batch:
            break
        taken.append(index)
    return taken


def refuse_apart(found: Iterable[Difference], bound: float, message: str) -> None:
    """Refuse log-probs that differ from the model's by more than rounding explains.

    Raises:
        UserError: the message, with the worst of them.
    """
    worst = max(found, key=lambda difference: difference.scaled)
    if not worst.scaled <= bound:
        raise UserError(
            f"{message}. {worst}; they are {worst.size:.2g} nat apart, and rounding explains "
            f"{bound * math.sqrt(worst.tokens):.2g}."
        )


def verify(
    policy: Policy, pairs: Sequence[TokenPair], stored: Tensor, packing: PackingOptions, count: int, seed: int
) -> str:
    """Score some stored sequences again, chosen by a seed, and say how far they are apart.

    Ranks that hold a model together have to call it together.

    Args:
        policy: see `score_reference`.
        pairs: all pairs.
        stored: fp32 [pairs, 2], what the store has of them; NaN where it has nothing.
        packing: how they are laid out.
        count: how many sequences, at most.
        seed: of the choice.

    Raises:
        UserError: they differ by more than rounding explains.
    """
    there = (~stored.isnan()).nonzero().tolist()
    chosen = [there[at] for at in np.random.default_rng(seed).permutation(len(there))[:count].tolist()]
    known = torch.full_like(stored, torch.nan)
    for index, side in chosen:
        known[index, side] = stored[index, side]
    found = score_again(policy, pairs, sorted({index for index, _ in chosen}), known, packing).values()
    bound = STORED[policy.compute_dtype.itemsize]
    refuse_apart(found, bound, "the store has other log-probs than this model gives; fill another one")
    worst = max(found, key=lambda difference: difference.size)
    return (
        f"verified {len(found)} of {len(there)} stored sequences: at most {worst.size:.2g} nat apart ({worst}); "
        f"rounding explains {bound * math.sqrt(worst.tokens):.2g}"
    )
