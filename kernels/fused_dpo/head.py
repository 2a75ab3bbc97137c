"""The language-model head as the kernels see it: a weight and the few things that happen to its logits."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class LowRankAdapter(NamedTuple):
    """LoRA on the head, `logits += scale * (hidden @ a.T) @ b.T` (Hu et al., 2021, arXiv 2106.09685, section 4.1)."""

    a: Tensor
    """Down projection [r, D]."""
    b: Tensor
    """Up projection [V, r]."""
    scale: float
    """`alpha / r` of the adapter."""


@dataclass(frozen=True)
class LMHead:
    """A language-model head.

    `logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias + lora) / softcap) / temperature`, where a missing
    part drops out.
    """

    weight: Tensor
    """[V, D], floating point."""
    bias: Tensor | None = None
    """[V]."""
    logit_scale: float = 1.0
    """Factor on the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`)."""
    softcap: float | None = None
    """Bound of the logits (Gemma 2's `final_logit_softcapping`), positive."""
    temperature: float = 1.0
    """Sampling temperature to score under, positive."""
    lora: LowRankAdapter | tuple[Tensor, Tensor, float] | None = None
    """Low-rank adapter on the weight."""
    process_group: Any = None
    """Reserved for a head whose vocabulary is split over ranks; anything but None is refused."""


class HeadGrads(NamedTuple):
    """Gradients of the differentiable inputs, None where not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


def head_of(model: nn.Module) -> LMHead:
    """Read the head of a Hugging Face causal language model, with its scale, softcap and LoRA adapter.

    Args:
        model: a `transformers` causal LM, bare or wrapped by `peft`. Tied embeddings are fine: the weight is the shared
            parameter itself, and its gradient arrives there.

    Raises:
        TypeError: the model has no output embeddings.
        NotImplementedError: the head carries something the kernels do not know (several active adapters, adapter
            dropout in training, a variant of LoRA, a sharded weight, an unknown factor on the logits).
    """
    getter = getattr(model, "get_output_embeddings", None)
    layer = getter() if getter is not None else None
    if layer is None or getattr(layer, "weight", None) is None:
        raise TypeError(
            f"{type(model).__name__} has no output embeddings to read a head from; pass the weight [V, D] or an LMHead."
        )
    logit_scale, softcap = _logit_transform(getattr(model, "config", None))
    base, lora = _peft_adapter(layer)
    return LMHead(base.weight, getattr(base, "bias", None), logit_scale=logit_scale, softcap=softcap, lora=lora)


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """Scale and softcap on the logits, by the names the model configurations use."""
    if config is None:
        return 1.0, None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere and MPT; Falcon-H1; Muse
        value = getattr(config, name, None)
        if isinstance(value, (int, float)):
            scale *= float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        model_type = str(getattr(config, "model_type", ""))
        if model_type.startswith("granite"):
            scale /= float(scaling)
        elif model_type.startswith("hyperclovax"):  # the same name, multiplied
            scale *= float(scaling)
        else:
            raise NotImplementedError(
                f"config.logits_scaling = {scaling} of model type {model_type!r}: some models divide by it and some "
                f"multiply; build the LMHead yourself with logit_scale set."
            )
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, float(softcap) if softcap else None


def _peft_adapter(layer: Any) -> tuple[Any, LowRankAdapter | None]:
    """The plain layer below `peft` wrappers and the one adapter that is active on it, if any."""
    if hasattr(layer, "modules_to_save"):  # peft's ModulesToSaveWrapper: a full copy that is trained instead
        active = layer.active_adapters[0] if layer.active_adapters else None
        copied = not layer.disable_adapters and active in layer.modules_to_save
        return (layer.modules_to_save[active] if copied else layer.original_module), None
    if not hasattr(layer, "lora_A"):
        return layer, None
    base = layer.get_base_layer()
    if layer.disable_adapters or layer.merged:
        return base, None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return base, None
    if len(active) > 1:
        raise NotImplementedError(f"the head has {len(active)} active adapters {active}; merge them or activate one.")
    name = active[0]
    dropout = layer.lora_dropout[name]
    if layer.training and getattr(dropout, "p", 0.0) > 0:
        raise NotImplementedError(
            f"adapter {name!r} has dropout {dropout.p} on the head, which the fused head does not apply; "
            f"set lora_dropout=0 or leave the head out of target_modules."
        )
    if name in getattr(layer, "lora_variant", {}) or layer.lora_A[name].bias is not None:
        raise NotImplementedError(
            f"adapter {name!r} on the head is not plain LoRA (a variant such as DoRA, or a bias)."
        )
    if layer.lora_B[name].bias is not None:
        raise NotImplementedError(f"adapter {name!r} has a bias on lora_B; train it with lora_bias=False.")
    return base, LowRankAdapter(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))
