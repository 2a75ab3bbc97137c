"""Which causal language models run packed, what their layers ask of attention, and the backend that can."""

import warnings
from typing import Any

import torch
from torch import nn

from fused_dpo_engine.attention.choice import AttentionNeeds, available_backends, candidates, load_backend
from fused_dpo_engine.attention.verify import verify_backend
from fused_dpo_engine.errors import UnsupportedModelError, UserError


def no_attention_of_ours(name: str) -> UnsupportedModelError:
    """Say that a class of models does not take its attention from us."""
    return UnsupportedModelError(
        f"{name} does not take its attention through transformers' AttentionInterface (ALiBi, recurrent layers or "
        f"attention of its own), so packed sequences would see each other."
    )


def check_packable(cls: type, config: Any) -> None:
    """Refuse models whose layers would not honour the plan of a packed row.

    Args:
        cls: the model's class.
        config: its configuration.

    Raises:
        UnsupportedModelError: naming the reason.
    """
    config = config.get_text_config()
    if not getattr(cls, "_supports_attention_backend", False):
        raise no_attention_of_ours(cls.__name__)
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    unknown = layer_types - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(
            f"{cls.__name__} has layers of type {sorted(unknown)}, which live in the mask or keep a state; "
            f"packed sequences would see each other."
        )


def warn_of_lengths(config: Any) -> None:
    """Warn where a sequence's log-prob depends on what it is packed with, by design of the model."""
    config = config.get_text_config()
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type") in ("longrope", "dynamic"):
            warnings.warn(
                f"rope_type {parameters['rope_type']!r} picks its frequencies by the longest sequence of a batch: "
                f"log-probs of sequences beyond the original context length depend on what they are packed with, as "
                f"they do in padded batches. --max-length {_original_length(config, parameters)} keeps all within it.",
                stacklevel=2,
            )


def attention_needs(model: nn.Module) -> AttentionNeeds:
    """Tell what the layers of a causal language model ask of an attention backend."""
    whole: Any = model.config
    config = whole.get_text_config()
    # Layers may differ (Gemma 4): the widest heads count.
    layers = list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]
    widest = max(layers, key=_head_dim)
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return AttentionNeeds(
        num_heads=widest.num_attention_heads,
        num_kv_heads=getattr(widest, "num_key_value_heads", None) or widest.num_attention_heads,
        head_dim=_head_dim(widest),
        value_dim=getattr(widest, "v_head_dim", None) or _head_dim(widest),
        window=getattr(config, "sliding_window", None) if windowed else None,
        softcap=getattr(config, "attn_logit_softcapping", None),
        sinks=any(name.endswith("sinks") for name, _ in model.named_parameters()),
    )


def attention_for(model: Any, device: torch.device, dtype: torch.dtype, wanted: str) -> str:
    """Name of the attention backend for a model's packed rows on this device; `wanted` as in `ModelOptions`.

    Raises:
        UserError: the one that is wanted is not there, cannot serve the model, fails or computes something else. Of
            those that nobody asked for by name, such a one is passed over with a warning.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    needs = attention_needs(model)
    names = candidates(needs, device, dtype, capability, available_backends(), wanted)
    for name in names:
        if name == "sdpa":  # what the others are compared with
            break
        try:
            verify_backend(name, load_backend(name), needs, device, dtype)
        except UserError as reason:
            if wanted != "auto":
                raise
            warnings.warn(f"passed over: {reason}", stacklevel=2)
        else:
            return name
    return "sdpa"


def _head_dim(config: Any) -> int:
    """Tell the width of queries and keys."""
    if getattr(config, "qk_nope_head_dim", None):  # multi-head latent attention
        return config.qk_nope_head_dim + config.qk_rope_head_dim
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _original_length(config: Any, parameters: dict[str, Any]) -> int | None:
    own = getattr(config, "original_max_position_embeddings", None)
    return parameters.get("original_max_position_embeddings") or own or config.max_position_embeddings
