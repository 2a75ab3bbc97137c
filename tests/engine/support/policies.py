"""Pairs, batches of them in every layout, and what the policy's tests compare them by."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_dpo_engine.attention.plan import plan_attention
from fused_dpo_engine.batching.packing import PackedBatch, pack
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.model.policy import Policy
from tests.engine.support.toys import make_pairs

CPU = torch.device("cpu")


def more_pairs(first: TokenPair) -> list[TokenPair]:
    """Another pair on the prompt of `first`, and one on a prompt of its own whose rejected response goes on."""
    start = first.rejected_ids[: first.prompt_length + 4]  # beyond the prompt it begins as another response does
    sides = np.append(start, [50, 51]).astype(np.int32), np.append(start[:-1], [52]).astype(np.int32)
    chosen = np.arange(100, 111, dtype=np.int32)
    longer = np.append(chosen, [60, 61, 62]).astype(np.int32)
    return [TokenPair(first.prompt_length, *sides, "pairs.jsonl:5"), TokenPair(6, chosen, longer, "pairs.jsonl:6")]


PAIRS = make_pairs((5, 7, 3), (12, 1, 16), (1, 9, 9), (20, 2, 1))  # beyond and below the windows of 8, one-token sides
PAIRS += more_pairs(PAIRS[1])
ORDER = [2, 4, 0, 5, 3, 1]
BATCH, UNSHARED = pack(PAIRS, ORDER), pack(PAIRS, ORDER, share=False)
LAYOUTS = {"shared": BATCH, "packed": UNSHARED}
ORDERED = [PAIRS[i] for i in BATCH.pair_indices]

VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 2e-5
"""Relative, in float64: eager attention and RMSNorm go through fp32 inside the models."""


def policy_of(model: Any, **settings: Any) -> Policy:
    """No autocast, so everything is computed in the dtype of the weights."""
    return Policy(model, torch.float32, **settings)


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest error of a sequence's log-prob."""
    return float(((got - expected) / expected).detach().abs().max())


def another_prefix(batch: PackedBatch) -> PackedBatch:
    """Branches see the beginning of another pair."""
    segments = list(batch.attention.segments)
    trunks = [at for at, segment in enumerate(segments) if segment.trunk == at]
    for at, segment in enumerate(segments):
        if segment.shared:
            other = trunks[(trunks.index(segment.trunk) + 1) % len(trunks)]
            length = segments[other].stop - segments[other].start
            segments[at] = segment._replace(trunk=other, shared=min(segment.shared, length))
    return replace(batch, attention=plan_attention(segments))
