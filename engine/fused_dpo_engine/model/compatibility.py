"""Which models can run packed, and what they ask of attention, told from class and configuration."""

import warnings
from typing import Any

from torch import nn

from fused_dpo_engine.attention.choice import AttentionNeeds
from fused_dpo_engine.errors import UnsupportedModelError

_WAY_OUT = "--no-packing trains it on padded batches."


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
            f"recurrent layers or attention of its own), so packed sequences would see each other; {_WAY_OUT}"
        )
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    unknown = layer_types - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers of type {sorted(unknown)}, which live in the mask or keep a state; "
            f"packed sequences would see each other; {_WAY_OUT}"
        )
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type") in ("longrope", "dynamic"):
            warnings.warn(
                f"rope_type {parameters['rope_type']!r} picks its frequencies by the longest sequence of a batch: "
                f"log-probs of sequences beyond the original context length depend on what they are packed with, as "
                f"they do in padded batches. --max-length {_original_length(config, parameters)} keeps all within it.",
                stacklevel=2,
            )


def backbone_of(model: Any) -> nn.Module:
    """Find the part of a causal language model that makes the hidden states which its head takes.

    Raises:
        UnsupportedModelError: it cannot be told from the model.
    """
    if model.base_model is not model:
        return model.base_model
    # Its attributes have other names than base_model expects (Llama 4, where get_decoder() is the model too).
    for backbone in (model.get_decoder(), getattr(model, "model", None)):
        if isinstance(backbone, nn.Module) and backbone is not model:
            return backbone
    raise UnsupportedModelError(
        f"{type(model).__name__} does not say which of its parts makes the hidden states; it cannot be trained here."
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
