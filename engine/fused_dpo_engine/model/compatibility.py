"""Which models can be trained, which run packed, and what they ask of attention, told from class and configuration."""

import re
import warnings
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from fused_dpo import backbone_of
from fused_dpo_engine.attention.choice import AttentionNeeds
from fused_dpo_engine.errors import UnsupportedModelError, UserError

_WAY_OUT = "--no-packing trains it on padded batches."
_LANGUAGE_MODELS = ("CausalLM", "ConditionalGeneration", "PreTraining", "LMHead")
"""What follows "For" in the names of classes with a language model's head."""
_OTHER_HEADS = ("score", "classifier", "qa_outputs", "reward_head", "regression_head")
"""Names of heads in transformers that are no language model's."""


def check_architecture(config: Any, name: str) -> None:
    """Refuse checkpoints of another head than a language model's, which would be made up or taken from elsewhere.

    Args:
        config: the model's.
        name: its folder or name.

    Raises:
        UnsupportedModelError: naming the architecture.
    """
    architectures = [str(each) for each in getattr(config, "architectures", None) or []]
    which = architectures[0] if architectures else type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name}: {which} is an encoder-decoder; only causal language models are trained.")
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):  # its authors say that it is one
        return
    head = re.search(r"For([A-Z]\w*)$", which)
    if head and not head[1].startswith(_LANGUAGE_MODELS):
        raise UnsupportedModelError(
            f"{name} holds a {which}, which has another head than a language model's; give the causal language model "
            f"that it was made from."
        )


def check_weights_left(info: dict[str, Any], name: str) -> None:
    """Refuse weights that lack a part of the model, or have a head that it has no place for.

    Args:
        info: `from_pretrained`'s loading info.
        name: the model's folder or name.

    Raises:
        UserError: naming a tensor.
    """
    other = sorted(key for key in info["unexpected_keys"] if key.split(".")[0] in _OTHER_HEADS)
    if other:
        raise UnsupportedModelError(
            f"the weights in {name} have another head than a language model's ({other[0]}); give the causal language "
            f"model that they were made from."
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"the weights in {name} lack {len(missing)} tensors that its configuration asks for, such as {missing[0]}; "
            f"they would be random."
        )


def causal_class_of(config: Any) -> type[nn.Module] | None:
    """Find the class that transformers loads for a configuration; None if it comes with the model, or there is none."""
    if getattr(config, "auto_map", None):
        return None
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    classes = found if isinstance(found, (tuple, list)) else [found]
    named = [cls for cls in classes if cls and cls.__name__ in (getattr(config, "architectures", None) or [])]
    return (named or classes)[0]


def no_attention_of_ours(name: str) -> UnsupportedModelError:
    """Say that a class of models does not take its attention from us."""
    return UnsupportedModelError(
        f"{name} does not take its attention through transformers' AttentionInterface (ALiBi, recurrent layers or "
        f"attention of its own), so packed sequences would see each other; {_WAY_OUT}"
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
            f"packed sequences would see each other; {_WAY_OUT}"
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


def check_backbone(model: Any) -> None:
    """Refuse a model of which no part is known to make the hidden states that its head takes.

    Raises:
        UnsupportedModelError: naming its class.
    """
    try:
        backbone_of(model)
    except TypeError as error:
        raise UnsupportedModelError(f"{error} It cannot be trained here.") from error


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
