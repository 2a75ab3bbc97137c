"""Read the head of a Hugging Face causal language model."""

from typing import Any

from torch import nn

from fused_dpo.head import LMHead, LowRankAdapter


def head_of(model: nn.Module) -> LMHead:
    """Read the head of a Hugging Face causal language model, with its scale, softcap and LoRA adapter.

    Args:
        model: a `transformers` causal LM, bare or wrapped by `peft`. Tied embeddings are fine: the weight is the shared
            parameter itself, and its gradient arrives there.

    Raises:
        TypeError: the model has no output embeddings.
        NotImplementedError: the head carries something the kernels do not know (several active adapters, adapter
            dropout in training, another adapter than LoRA, an unknown factor on the logits, layers between the hidden
            states and the weight, as BERT's).
    """
    getter = getattr(model, "get_output_embeddings", None)
    layer = getter() if getter is not None else None
    if layer is None or getattr(layer, "weight", None) is None:
        raise TypeError(
            f"{type(model).__name__} has no output embeddings to read a head from; pass the weight [V, D] or an LMHead."
        )
    _refuse_layers_before(layer, model)
    logit_scale, softcap = _logit_transform(getattr(model, "config", None))
    base, lora = _peft_adapter(layer)
    return LMHead(base.weight, getattr(base, "bias", None), logit_scale=logit_scale, softcap=softcap, lora=lora)


def _refuse_layers_before(layer: nn.Module, model: nn.Module) -> None:
    """Refuse heads that are more than a weight: the last hidden states are not what it multiplies there."""
    if hasattr(model, "get_base_model"):  # peft
        model = model.get_base_model()  # pyright: ignore[reportCallIssue]
    body = getattr(model, "base_model", None)
    for name, part in model.named_children():
        if part is body or part is layer or hasattr(part, "get_output_embeddings"):
            continue
        # BERT and RoBERTa have a dense layer and a norm beside the weight, Electra has them one level up.
        if name == "generator_predictions" or _has_layers_beside(part, layer):
            raise NotImplementedError(
                f"{type(model).__name__} changes the hidden states in {name!r} before the head's weight multiplies "
                f"them; apply that part yourself, and pass its output with the weight [V, D] or an LMHead."
            )


def _has_layers_beside(part: nn.Module, layer: nn.Module) -> bool:
    """Tell whether `layer` lies within `part`, and so do other modules with parameters."""
    modules = set(part.modules())
    others = modules - set(layer.modules()) - {part}
    return layer in modules and any(list(module.parameters(recurse=False)) for module in others)


# Factors on the logits and bounds of them, by the names that model configurations in transformers use.
_MULTIPLIERS = ("lm_head_multiplier", "output_multiplier")  # Falcon-H1; Muse
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2; RecurrentGemma; xLSTM
_NOT_OF_THE_HEAD = ("attn", "attention", "router", "expert", "output_logits")


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """Read scale and softcap of the logits from the model's configuration."""
    if config is None:
        return 1.0, None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    model_type = str(getattr(config, "model_type", ""))
    scale, softcap = 1.0, None
    for name in dir(config):  # properties count too
        if "logit" not in name and name not in _MULTIPLIERS:
            continue
        value = getattr(config, name, None)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if name in _MULTIPLIERS or (name == "logit_scale" and model_type.startswith("cohere")):
            scale *= float(value)
        elif name == "logits_scaling" and model_type.startswith(("granite", "minicpm3")):
            scale /= float(value)
        elif name == "logits_scaling" and model_type.startswith("hyperclovax"):  # the same name, multiplied
            scale *= float(value)
        elif name == "logit_scale" and model_type == "mpt":  # in the configuration, but not in the model
            continue
        elif name in _SOFTCAPS:
            softcap = float(value) or None
        elif "logit" in name and value not in (0, 1) and not name.startswith(_NOT_OF_THE_HEAD):
            raise NotImplementedError(
                f"config.{name} = {value} of model type {model_type!r} may be a factor on the logits that is not known "
                f"here; build the LMHead yourself, with logit_scale or softcap set as the model applies it."
            )
    return scale, softcap


def _peft_adapter(layer: Any) -> tuple[Any, LowRankAdapter | None]:
    """Find the plain layer below `peft` wrappers, and the one adapter that is active on it, if any."""
    if hasattr(layer, "modules_to_save"):  # peft's ModulesToSaveWrapper: a full copy that is trained instead
        active = layer.active_adapters[0] if layer.active_adapters else None
        copied = not layer.disable_adapters and active in layer.modules_to_save
        return (layer.modules_to_save[active] if copied else layer.original_module), None
    if not type(layer).__module__.startswith("peft."):
        return layer, None
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
    if layer.disable_adapters or getattr(layer, "merged", False):
        return base, None
    if not hasattr(layer, "lora_A") or hasattr(layer, "lora_E"):
        raise NotImplementedError(
            f"the head carries an adapter of type {type(layer).__module__}.{type(layer).__name__}, which is not LoRA; "
            f"merge it into the weight, or leave the head out of the adapter's modules."
        )
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
