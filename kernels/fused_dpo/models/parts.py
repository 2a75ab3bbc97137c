"""Find the parts of a Hugging Face model: the language model in it, its head's layer, its backbone."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from fused_dpo.models.adapters import unwrapped


def backbone_of(model: Any) -> nn.Module:
    """Find the part of a language model whose call gives the hidden states that its head takes.

    `backbone_of(model)(input_ids, use_cache=False).last_hidden_state` goes with `head_of(model)`. Of a multimodal model
    it is the part that takes its inputs, images too, where there is one; else that of its language model.

    Args:
        model: a `transformers` causal language model, bare or wrapped by `peft` or `torch.compile`. Virtual tokens of
            prompt learning are not put in front: that is done in peft's own call.

    Raises:
        TypeError: the model is wrapped for several devices, or its parts do not say which makes the hidden states (an
            encoder-decoder such as T5, whose two stacks no part holds: take `decoder_hidden_states[-1]`).
    """
    owner = list(owners_of(causal_model(model)))[-1]
    decoder = getattr(owner, "get_decoder", None)
    encoder_decoder = getattr(getattr(owner, "config", None), "is_encoder_decoder", False) is True
    # The name of the first is wrong in some families (Llama 4): base_model is the model itself there.
    candidates = [getattr(owner, "base_model", None)]
    if not encoder_decoder:
        candidates += [decoder() if decoder is not None else None]
    candidates += [getattr(owner, "model", None)]
    for part in candidates:
        if isinstance(part, nn.Module) and part is not owner and head_layer(part) is None:
            return part
    hint = "; call it with output_hidden_states=True, and take decoder_hidden_states[-1]" if encoder_decoder else ""
    raise TypeError(f"{type(owner).__name__} does not say which of its parts makes the hidden states{hint}.")


def causal_model(model: Any) -> Any:
    """Give the `transformers` model below `torch.compile`, FSDP1 and `peft`.

    Raises:
        TypeError: it is wrapped by DistributedDataParallel or the like.
    """
    model = unwrapped(model)
    if not hasattr(model, "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
        name = type(model).__name__
        raise TypeError(
            f"{name} wraps the model: pass its .module, and do so within the call of the {name}, as its hooks run "
            f"there (called from outside, DistributedDataParallel leaves gradients unreduced)."
        )
    return unwrapped(model.get_base_model()) if hasattr(model, "get_base_model") else model


def owners_of(model: Any) -> Iterator[Any]:
    """Walk from a model to the part of it whose forward makes the logits: some hold a language model (BLIP-2)."""
    layer = head_layer(model)
    while model is not None:
        yield model
        children = model.children() if isinstance(model, nn.Module) and layer is not None else ()
        model = next((part for part in children if part is not layer and head_layer(part) is layer), None)


def head_layer(part: Any) -> Any:
    """Give the layer that a part of a model names as its head; None for none."""
    getter = getattr(part, "get_output_embeddings", None)
    return None if getter is None else getter()
