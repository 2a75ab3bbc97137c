"""Attention over packed rows, registered with transformers under the name `fused_dpo`.

transformers hands every keyword argument of `model(...)` that it does not know to the attention function, also through
gradient checkpointing and peft: that is how the plan of a batch and the backend get here. No mask function is
registered, so no mask is built: what a token may see follows from the plan alone.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fused_dpo_engine.attention_call import AttentionCall, Backend
from fused_dpo_engine.attention_choice import AttentionNeeds
from fused_dpo_engine.attention_segments import segment_attention
from fused_dpo_engine.errors import UnsupportedModelError, UserError, first_line
from fused_dpo_engine.packing import AttentionPlan, Segment, plan_attention

ATTENTION_NAME = "fused_dpo"
ANOTHER = "Others are --attention varlen, flex and sdpa."


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    fused_dpo_plan: AttentionPlan | None = None,
    fused_dpo_backend: Backend = segment_attention,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal self-attention of every segment of the packed row over its shared prefix and itself.

    Without a plan every row of the batch is one segment, the plain causal attention. Dropout is not applied: policy and
    reference have to see the same function.

    Args:
        module: the attention layer.
        query: [B, H, T, head dim].
        key: [B, H_kv, T, head dim], H a multiple of H_kv.
        value: [B, H_kv, T, value dim].
        attention_mask: must be None.
        scaling: factor on the scores; None for 1/sqrt(head dim).
        dropout: ignored.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        softcap: bound of the scores, `softcap * tanh(scores / softcap)` (Gemma 2).
        s_aux: attention sinks [H] (gpt-oss).
        fused_dpo_plan: the segments of a packed row; then B = 1.
        fused_dpo_backend: what computes them.

    Returns:
        [B, T, H, value dim], and None for the attention weights.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes no attention_mask; pass attention_mask=None and use_cache=False.")
    if getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends in both directions; only causal models are packed."
        )
    call = AttentionCall(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    if fused_dpo_plan is None:
        whole = plan_attention([Segment(0, query.shape[2], 0, 0)])
        return segment_attention(query, key, value, whole, call), None
    if query.shape[0] != 1 or query.shape[2] != fused_dpo_plan.num_rows:
        raise ValueError(
            f"the plan covers one row of {fused_dpo_plan.num_rows} tokens, the batch has {query.shape[0]} of "
            f"{query.shape[2]}."
        )
    return fused_dpo_backend(query, key, value, fused_dpo_plan, call), None


def verify_backend(
    name: str, backend: Backend, needs: AttentionNeeds, device: torch.device, dtype: torch.dtype
) -> None:
    """Compare a backend with `segment_attention` in fp32 on a small shared plan, values and gradients, on this device.

    What a release of a kernel may do otherwise (a diagonal aligned top-left, a window one wider) is silent elsewhere.
    Segments and window are longer than a kernel's tiles, and the softcap is low enough for scores of size 1 to show it.

    Raises:
        UserError: they differ by more than the rounding of `dtype`, or the backend fails.
    """
    window = None if needs.window is None else min(needs.window, 150)
    softcap = None if needs.softcap is None else min(needs.softcap, 2.0)
    plan = plan_attention([Segment(0, 500, 0, 0), Segment(500, 560, 0, 400), Segment(560, 900, 2, 0)]).to(device)
    random = torch.Generator().manual_seed(0)
    heads = (needs.num_heads, needs.num_kv_heads, needs.num_kv_heads)
    widths = (needs.head_dim, needs.head_dim, needs.value_dim)
    rows = plan.num_rows
    tensors = [torch.randn(1, h, rows, w, generator=random).to(dtype) for h, w in zip(heads, widths, strict=True)]
    sinks = torch.randn(needs.num_heads, generator=random).to(device) if needs.sinks else None
    call = AttentionCall(1 / math.sqrt(needs.head_dim), window, softcap, sinks)
    upstream = torch.randn(1, rows, needs.num_heads, needs.value_dim, generator=random)

    def run(function: Backend, kind: torch.dtype) -> list[Tensor]:
        q, k, v = (tensor.to(device, kind).requires_grad_() for tensor in tensors)
        with torch.enable_grad():
            out = function(q, k, v, plan, call)
            return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream.to(device, kind))]

    bound = 4 * torch.finfo(dtype).eps
    true_ones = run(segment_attention, torch.float32)
    try:
        got_ones = run(backend, dtype)
    except Exception as error:  # a kernel of another device, a compiler that fails, other arguments
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"attention backend {name} fails on this device: {reason} {ANOTHER}") from error
    for what, got, true in zip(("output", "query", "key", "value"), got_ones, true_ones, strict=True):
        error = float((got.float() - true).norm() / true.norm())
        if not error <= bound:
            kind = what if what == "output" else f"gradient of the {what}"
            raise UserError(
                f"attention backend {name} does not compute what it should on this device: relative error {error:.2g} "
                f"of the {kind} (bound {bound:.2g}). {ANOTHER}"
            )


AttentionInterface.register(ATTENTION_NAME, packed_attention)
