"""Packed attention through FlexAttention: softcap and sinks on CUDA with torch alone.

The mask says who sees whom, so keys need no gathering. Not run on a GPU yet, and never chosen on a CPU: torch has no
backward for it there, so the tests check its forward, and `verify_backend` both on the user's device. Torch's compiled
code for CPUs is also wrong with AVX2 (torch 2.13: `CppMicroGemmFP32Vec` writes 16 scores where the last 8 are left, for
heads 8 or 16 wide and numbers of keys that leave 8 when divided by 16; with AVX512 it never comes to that).
"""

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from fused_dpo_engine.attention.call import AttentionCall, not_traced
from fused_dpo_engine.attention.plan import AttentionPlan

_masks: WeakKeyDictionary[AttentionPlan, dict[Any, BlockMask]] = WeakKeyDictionary()
"""Masks of the batches that are still in use, by window: the layers of a model share one or two."""


VARIANTS = 64
"""How often FlexAttention may be compiled: with and without gradient, window and softcap, and for a few ranges of
lengths. At torch's own limit of 8 it would go on uncompiled, with T² scores a head in memory."""


@not_traced
def flex_backend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, call: AttentionCall) -> Tensor:
    """Compute packed attention through FlexAttention, as `fused_dpo_engine.attention.call.Backend` says.

    Memory: the mask is made from T² booleans (with a window T² int32 more) once a batch, and kept as a map of blocks.
    """
    q, k, v = (tensor.to(value.dtype) for tensor in (query, key, value))
    softcap = call.softcap

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    mask = block_mask(plan, call.window, q.device)
    # As a variable, which a second value would make of it, inductor could not lower the softcap.
    with torch._dynamo.config.patch(specialize_float=True, recompile_limit=VARIANTS):  # pyright: ignore
        out = _flex(q.device.type)(
            q,
            k,
            v,
            score_mod=None if softcap is None else capped,
            block_mask=mask,
            scale=call.scaling,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=None if call.sinks is None else AuxRequest(lse=True),
        )
    if call.sinks is not None:
        out, aux = out
        # The sink joins the softmax's denominator: exp(lse) / (exp(lse) + exp(sink)) of every weight is left.
        out = out * torch.sigmoid(aux.lse - call.sinks.float().view(1, -1, 1))[..., None].to(out.dtype)
    return out.transpose(1, 2)


def block_mask(plan: AttentionPlan, window: int | None, device: torch.device) -> BlockMask:
    """Make the plan a block mask over the packed row, once a batch and window."""
    masks = _masks.setdefault(plan, {})
    if (window, device) not in masks:
        masks[window, device] = _make_mask(plan, window, device)
    return masks[window, device]


def _make_mask(plan: AttentionPlan, window: int | None, device: torch.device) -> BlockMask:
    length = plan.num_rows
    table = np.empty((4, length), dtype=np.int32)
    for start, stop, trunk, shared in plan.segments:
        first = plan.segments[trunk].start
        table[:3, start:stop] = [[start], [first], [first + shared]]
        table[3, start:stop] = np.arange(shared, shared + stop - start)
    start, first, shared_stop, position = torch.from_numpy(table).to(device)

    def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (start[q] <= k) & (k <= q)
        visible = own | ((first[q] <= k) & (k < shared_stop[q]))
        return visible if window is None else visible & (position[q] - position[k] < window)

    return create_block_mask(sees, None, None, length, length, device=device)


@cache
def _flex(device: str) -> Any:
    """Take FlexAttention compiled for CUDA, where nothing else is fast; elsewhere torch's plain form of it."""
    return torch.compile(flex_attention) if device == "cuda" else flex_attention
