"""Attention over packed rows, registered with transformers under the name `fused_dpo`.

transformers hands every keyword argument of `model(...)` that it does not know to the attention function, also through
gradient checkpointing and peft: that is how the plan of a batch and the backend get here. No mask function is
registered, so no mask is built: what a token may see follows from the plan alone.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from fused_dpo_engine.attention.call import AttentionCall, Backend
from fused_dpo_engine.attention.plan import AttentionPlan, Segment, plan_attention
from fused_dpo_engine.attention.segments import segment_attention
from fused_dpo_engine.errors import UnsupportedModelError

ATTENTION_NAME = "fused_dpo"


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
    """Compute causal self-attention of every segment of the packed row over its shared prefix and itself.

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


AttentionInterface.register(ATTENTION_NAME, packed_attention)
