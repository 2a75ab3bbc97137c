"""Read the head of a Hugging Face language model."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fused_dpo.head import LMHead, LowRankAdapter
from fused_dpo.integrations.forward_source import calls_another_part_first, scale_before_head
from fused_dpo.validation import DTYPES


def head_of(model: nn.Module) -> LMHead:
    """Read the head of a Hugging Face language model, with its scale, bias, softcap and LoRA adapter.

    Args:
        model: a `transformers` causal LM or encoder-decoder, bare or wrapped by `peft`. Tied embeddings are fine: the
            weight is the shared parameter itself, and its gradient arrives there. The head takes the decoder's last
            hidden states: a factor on these (T5) is in `logit_scale`, a buffer that is added to the logits (BART,
            Marian) in `bias`.

    Raises:
        TypeError: the model has no output embeddings.
        NotImplementedError: the head carries something the kernels do not know (a quantised weight, several active
            adapters, adapter dropout in training, another adapter than LoRA, an unknown factor on the logits, layers
            between the hidden states and the weight, as BERT's).
    """
    getter = getattr(model, "get_output_embeddings", None)
    layer = getter() if getter is not None else None
    if layer is None or not hasattr(layer, "forward"):
        raise TypeError(
            f"{type(model).__name__} has no output embeddings to read a head from; pass the weight [V, D] or an LMHead."
        )
    base, lora = _peft_adapter(layer)
    _refuse_quantised(base)
    owners = list(_owners(model, layer))
    bias, factor = getattr(base, "bias", None), 1.0
    for owner in owners:
        _refuse_another_head(layer, base, owner)
        factor *= _scale_before(owner)
        for extra in _biases_of(owner, len(base.weight)):
            bias = extra if bias is None else bias + extra
    logit_scale, softcap = _logit_transform(getattr(owners[-1], "config", None))
    if factor != 1.0 and bias is not None:
        bias = bias / factor  # the model adds it to logits of scaled hidden states, LMHead scales the sum
    return LMHead(base.weight, bias, logit_scale=logit_scale * factor, softcap=softcap, lora=lora)


def _owners(model: Any, layer: nn.Module) -> Iterator[nn.Module]:
    """Walk from the model to the part of it whose head `layer` is: some models hold a language model (BLIP-2)."""
    if hasattr(model, "get_base_model"):  # peft
        model = model.get_base_model()
    while model is not None:
        yield model
        children = model.children() if isinstance(model, nn.Module) else ()
        model = next((part for part in children if part is not layer and _head_layer(part) is layer), None)


def _head_layer(part: Any) -> Any:
    getter = getattr(part, "get_output_embeddings", None)
    return None if getter is None else getter()


def _refuse_quantised(base: Any) -> None:
    """Refuse a layer whose weight is not the numbers that multiply the hidden states."""
    name, weight = f"{type(base).__module__}.{type(base).__name__}", getattr(base, "weight", None)
    if weight is None:
        raise NotImplementedError(f"the head is a {name}, which has no weight [V, D] to read (a quantised layer?).")
    packages = {type(thing).__module__.split(".")[0] for thing in (base, weight)}
    if weight.dtype not in DTYPES or packages & {"bitsandbytes", "torchao"}:
        raise NotImplementedError(
            f"the head is a {name}, whose weight is a quantised {type(weight).__name__} of {weight.dtype}, which the "
            f"kernels do not read; quantise the model without its head (llm_int8_skip_modules=['lm_head'] in "
            f"bitsandbytes)."
        )


def _refuse_another_head(layer: nn.Module, base: Any, owner: Any) -> None:
    """Refuse heads that are more than a weight, and weights that are not the head."""
    _refuse_layers_before(layer, owner)
    name = type(owner).__name__
    if getattr(getattr(owner, "config", None), "ngram", None):
        raise NotImplementedError(f"{name} makes its logits from a stream of its own (ngram), not its hidden states.")
    if isinstance(base, nn.Embedding):  # FSMT names its input embeddings, which may be tied to the head or not
        linears = [part for part in owner.modules() if isinstance(part, nn.Linear)]
        if any(part.weight.shape == base.weight.shape and part.weight is not base.weight for part in linears):
            raise NotImplementedError(
                f"{name} names its input embeddings as the head, and has a layer of that shape beside; pass the weight "
                f"[V, D] that makes its logits."
            )


def _refuse_layers_before(layer: nn.Module, model: Any) -> None:
    """Refuse heads with layers of their own: the last hidden states are not what the weight multiplies there."""
    if not isinstance(model, nn.Module):
        return
    body = getattr(model, "base_model", None)
    before = calls_another_part_first(model, layer)
    for name, part in model.named_children():
        if part is body or part is layer or _head_layer(part) is layer:
            continue
        # BERT and RoBERTa have a dense layer and a norm beside the weight; Electra and ModernBERT one level up.
        if name == before or _has_layers_beside(part, layer):
            raise NotImplementedError(
                f"{type(model).__name__} changes the hidden states in {name!r} before the head's weight multiplies "
                f"them; apply that part yourself, and pass its output with the weight [V, D] or an LMHead."
            )


def _has_layers_beside(part: nn.Module, layer: nn.Module) -> bool:
    """Tell whether `layer` lies within `part`, and so do other modules with parameters."""
    modules = set(part.modules())
    others = modules - set(layer.modules()) - {part}
    return layer in modules and any(list(module.parameters(recurse=False)) for module in others)


def _scale_before(model: Any) -> float:
    """Tell by what the hidden states are multiplied before the weight; no causal model of transformers does that."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return scale_before_head(model) if encoder_decoder is True else 1.0


def _biases_of(model: Any, vocabulary: int) -> Iterator[Tensor]:
    """Find what a model adds to its logits beside the head's own bias, [V] each: BART's `final_logits_bias` [1, V].

    Raises:
        NotImplementedError: it holds something else with a number for each token.
    """
    own = {**getattr(model, "_parameters", {}), **getattr(model, "_buffers", {})}
    for name, value in own.items():
        if value is None or value.numel() != vocabulary:
            continue
        if "bias" not in name:
            raise NotImplementedError(
                f"{type(model).__name__}.{name} has a number for each token, and may change the logits in a way that "
                f"is not known here; build the LMHead yourself."
            )
        yield value.view(-1)


# Factors on the logits and bounds of them, by the names that model configurations in transformers use.
_MULTIPLIERS = ("lm_head_multiplier", "output_multiplier")  # Falcon-H1; Muse
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2; RecurrentGemma; xLSTM
_NOT_OF_THE_HEAD = ("attn", "attention", "router", "expert", "output_logits")


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """Read scale and softcap of the logits from the model's configuration."""
    if config is None:
        return 1.0, None
    if getattr(config, "is_encoder_decoder", False) is True and hasattr(config, "decoder"):  # T5Gemma
        config = config.decoder
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
