"""Packed attention a segment at a time through torch's SDPA: any device and dtype, softcap, windows and sinks."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_dpo_engine.attention.call import AttentionCall, not_traced
from fused_dpo_engine.attention.plan import AttentionPlan


@not_traced
def segment_attention(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, call: AttentionCall) -> Tensor:
    """Compute attention of every segment over its trunk's shared rows and its own, causal, aligned bottom-right.

    Args:
        query: [B, H, T, head dim]; B is 1, but for one segment that is all of the row.
        key: [B, H_kv, T, head dim]; H a multiple of H_kv.
        value: [B, H_kv, T, value dim].
        plan: the segments.
        call: what the layer asks for.

    Returns:
        [B, T, H, value dim], in the values' dtype.

    Numerics:
        fp32 on a CPU also for half-precision inputs: oneDNN compiles half-precision products anew for every length,
        and segments come in all lengths; fp32 is as fast on segments this short (measured), and more accurate.
    """
    dtype, device = value.dtype, query.device.type
    compute_dtype = _compute_dtype(value)
    lengths = [segment.stop - segment.start for segment in plan.segments]
    # Split once: slices would each send back a gradient as long as the whole row.
    queries, keys, values = (tensor.to(compute_dtype).split(lengths, dim=2) for tensor in (query, key, value))
    pieces = []
    with torch.autocast(device, enabled=False), _kernels(device):
        for at, segment in enumerate(plan.segments):
            k, v = keys[at], values[at]
            if segment.shared:
                k = torch.cat((keys[segment.trunk][:, :, : segment.shared], k), dim=2)
                v = torch.cat((values[segment.trunk][:, :, : segment.shared], v), dim=2)
            pieces.append(attention(queries[at], k, v, visible_keys(queries[at], k, call.window), call).transpose(1, 2))
    return torch.cat(pieces, dim=1).to(dtype)


@not_traced
def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: AttentionCall, *, causal: bool
) -> Tensor:
    """Compute the attention of a call without a plan.

    Args:
        query: [B, H, T, head dim].
        key: [B, H_kv, S, head dim]; H a multiple of H_kv.
        value: [B, H_kv, S, value dim].
        mask: what each token sees, windows included, see `packed_attention`; None for all, or all before it.
        call: what the layer asks for.
        causal: without a mask, a token sees none after it.

    Returns:
        [B, T, H, value dim], in the values' dtype.
    """
    compute_dtype = _compute_dtype(value)
    q, k, v = (tensor.to(compute_dtype) for tensor in (query, key, value))
    if mask is None:
        mask = visible_keys(q, k, call.window, causal=causal)
    elif mask.dtype != torch.bool:
        mask = mask.to(compute_dtype)
    with torch.autocast(q.device.type, enabled=False):
        return attention(q, k, v, mask, call).transpose(1, 2).contiguous().to(value.dtype)


def visible_keys(q: Tensor, k: Tensor, window: int | None, *, causal: bool = True) -> Tensor | None:
    """Tell which of S keys the last L tokens see, bool [L, S]; None where SDPA's own causality says the same.

    Args:
        q: [B, H, L, D].
        k: [B, H_kv, S, D].
        window: see `AttentionCall`.
        causal: False if all tokens see all.
    """
    queries, keys = q.shape[2], k.shape[2]
    if not causal:
        return torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if queries == keys and (window is None or window >= keys):
        return None
    distance = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: AttentionCall) -> Tensor:
    """Compute attention where a mask is True, or causal without one: -> [B, H, L, value dim].

    Args:
        q: [B, H, L, D].
        k: [B, H_kv, S, D].
        v: [B, H_kv, S, value dim].
        mask: bool or added to the scores, [..., L, S]; None only where L = S.
        call: scaling, softcap and sinks; its window is in the mask already.
    """
    if call.softcap is None and call.sinks is None:
        # With a mask or in fp32 CUDA has SDPA's plain form alone for groups, which keeps L x S scores a head.
        if q.is_cuda and (mask is not None or q.dtype == torch.float32):
            k, v = _for_every_head(q, k, v)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=call.scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    # No fused kernel of torch caps the scores or has sinks on every device: spelled out, softmax in fp32 as models do.
    k, v = _for_every_head(q, k, v)
    scores = q @ k.transpose(2, 3) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril_()
    # Not -inf: of a token that sees nothing, such as padding on the left, the softmax would be NaN.
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if call.sinks is not None:  # one more key a head, with a score of its own and the value 0
        sinks = call.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights[..., : k.shape[2]].to(v.dtype) @ v


def _compute_dtype(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32) if value.device.type == "cpu" else value.dtype


def _for_every_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def _kernels(device: str) -> AbstractContextManager[Any]:
    """Allow SDPA's kernels but cuDNN's, which makes a plan for every pair of lengths; segments come in all lengths."""
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels) if device == "cuda" else nullcontext()
