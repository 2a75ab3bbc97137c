"""Attention over packed rows, registered with transformers under the name `fused_dpo`.

transformers hands every keyword argument of `model(...)` that it does not know to the attention function, also through
gradient checkpointing and peft: that is how the plan of a batch gets here. No mask function is registered, so no mask
is built: what a token may see follows from the plan alone.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from fused_dpo_engine.errors import UserError
from fused_dpo_engine.packing import AttentionPlan

ATTENTION_NAME = "fused_dpo"


class UnsupportedModelError(UserError):
    """The model's architecture cannot run packed."""


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
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal self-attention of every segment of the packed row with itself.

    Without a plan every row of the batch is one segment, the plain causal attention. Dropout is not applied: policy and
    reference have to see the same function.

    Args:
        module: the attention layer.
        query: [B, H, T, head dim].
        key: [B, H_kv, T, head dim], as `value`; H a multiple of H_kv.
        value: see key.
        attention_mask: must be None.
        scaling: factor on the scores; None for 1/sqrt(head dim).
        dropout: ignored.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        softcap: bound of the scores, `softcap * tanh(scores / softcap)` (Gemma 2).
        s_aux: attention sinks (gpt-oss), refused.
        fused_dpo_plan: the segments of a packed row; then B = 1.

    Returns:
        [B, T, H, head dim], and None for the attention weights.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes no attention_mask; pass attention_mask=None and use_cache=False.")
    if s_aux is not None:
        raise UnsupportedModelError("attention sinks (s_aux, as in gpt-oss) are not supported by packed attention.")
    if getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends in both directions; only causal models are packed."
        )
    segments = ((0, query.shape[2]),) if fused_dpo_plan is None else fused_dpo_plan.segments
    if segments[-1][1] != query.shape[2]:
        raise ValueError(f"the plan covers {segments[-1][1]} tokens, the batch has {query.shape[2]}.")
    # Under autocast the rotary embedding may hand over fp32 queries and keys beside half-precision values.
    dtype, device = value.dtype, value.device.type
    # On a CPU oneDNN compiles half-precision products anew for every length, and segments come in all lengths; fp32 is
    # as fast on segments this short (measured), and more accurate.
    compute_dtype = torch.promote_types(dtype, torch.float32) if device == "cpu" else dtype
    query, key, value = query.to(compute_dtype), key.to(compute_dtype), value.to(compute_dtype)
    with torch.autocast(device, enabled=False):
        pieces = []
        for start, stop in segments:
            q, k, v = query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop]
            pieces.append(_segment_attention(q, k, v, scaling, sliding_window, softcap).transpose(1, 2))
    return torch.cat(pieces, dim=1).to(dtype), None


def _segment_attention(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    length = q.shape[2]
    mask = None
    if window is not None and window < length:
        distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        mask = (distance >= 0) & (distance < window)
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    # No fused kernel of torch caps the scores on every device: spelled out, softmax in fp32 as the models do it.
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * (scaling if scaling is not None else 1 / math.sqrt(q.shape[-1]))
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril_()
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights.to(v.dtype) @ v


def check_packable(model: nn.Module) -> None:
    """Refuse models whose layers would not honour the plan, and warn where results depend on the batch by design.

    Raises:
        UnsupportedModelError: naming the reason.
    """
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder; only causal models can be packed.")
    config = config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not take its attention through transformers' AttentionInterface (ALiBi, "
            f"recurrent layers or attention of its own), so packed sequences would see each other."
        )
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    unknown = layer_types - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers of type {sorted(unknown)}, which live in the mask or keep a state; "
            f"packed sequences would see each other."
        )
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type") in ("longrope", "dynamic"):
            warnings.warn(
                f"rope_type {parameters['rope_type']!r} picks its frequencies by the longest sequence of a batch: "
                f"log-probs of sequences beyond the original context length depend on what they are packed with, as "
                f"they do in padded batches.",
                stacklevel=2,
            )


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


AttentionInterface.register(ATTENTION_NAME, packed_attention)
