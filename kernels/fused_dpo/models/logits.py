"""What the class that makes a model's logits does to them: scale, softcap, rows that are cut off."""

from typing import Any, NamedTuple

from torch import nn

from fused_dpo.models.forward_source import FACTORS, Forward, follow, read_forward

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2; RecurrentGemma; xLSTM
_ROWS = "unpadded_vocab_size"  # Inkling


class LogitTransform(NamedTuple):
    """What becomes of `hidden @ weight.T + bias`."""

    scale: float
    on_hidden: float
    """The part of `scale` that multiplies the hidden states, and so not the layer's own bias."""
    softcap: float | None
    rows: int | None
    """How many of the weight's rows have logits, None for all."""
    before: tuple[str, ...]
    """Parts of the model that are called on the hidden states before the head."""


def logit_transform(model: nn.Module, head: str) -> LogitTransform:
    """Read scale and softcap: what the forward of the class mentions is applied, with the values that the model has.

    A multimodal class may leave out what the text model of the same configuration does (Cohere 2 Vision, Granite
    Speech), so the configuration alone does not tell.

    Args:
        model: whose forward makes the logits.
        head: path of the layer that it calls for them, itself or in a part of it.

    Raises:
        NotImplementedError: a step on the way to the logits is not understood; or the configuration names a scale or
            softcap, and no forward that calls the head has a source to tell what becomes of it.
    """
    return _transform(model, head, _text_config(getattr(model, "config", None)))


def _transform(model: nn.Module, head: str, config: dict[str, Any]) -> LogitTransform:
    name, parts = type(model).__name__, head.split(".")
    paths = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    forward = None
    for called in paths if head else ():
        forward = read_forward(type(model), called)
        if forward is None or forward.calls_head:
            break
    else:
        called = ""
    if forward is None or not forward.calls_head:
        _refuse_what_cannot_be_told(name, config, forward)
        return LogitTransform(1.0, 1.0, None, None, ())
    if forward.unknown is not None:
        raise NotImplementedError(
            f"{name}.forward computes {forward.unknown!r} on the way to its logits, which is not understood here; "
            f"build the LMHead yourself, with logit_scale, softcap and bias set as the model applies them."
        )
    scale, on_hidden = _scales(model, forward)
    softcap = next((float(value) for value in map(config.get, _SOFTCAPS) if value), None) if forward.caps else None
    rows = config.get(_ROWS) if _ROWS in forward.names else None
    before = forward.before
    if called != head:  # in a part of the model that has a forward of its own (T5Gemma, XLM)
        inner = _transform(follow(model, called), head.removeprefix(f"{called}."), {})
        scale, on_hidden, softcap = scale * inner.scale, on_hidden * inner.on_hidden, softcap or inner.softcap
        before += tuple(f"{called}.{part}" for part in inner.before)
    return LogitTransform(scale, on_hidden, softcap, rows, before)


def _scales(model: nn.Module, forward: Forward) -> tuple[float, float]:
    scale = on_hidden = 1.0
    for factor in forward.factors:
        if factor.switch == "":
            raise NotImplementedError(
                f"{type(model).__name__} scales its hidden states or logits by {factor.setting} under a condition that "
                f"is not understood here; build the LMHead yourself, with logit_scale set as the model applies it."
            )
        if factor.switch is None or follow(model, factor.switch):
            value = float(follow(model, factor.setting)) ** factor.power
            scale *= value
            on_hidden *= 1.0 if factor.on_logits else value
    return scale, on_hidden


def _text_config(config: Any) -> dict[str, Any]:
    """Look up the settings of the logits in the configuration of the model that speaks."""
    if config is None:
        return {}
    if getattr(config, "is_encoder_decoder", False) is True and hasattr(config, "decoder"):  # T5Gemma
        config = config.decoder
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    values = {name: getattr(config, name, None) for name in (*FACTORS, *_SOFTCAPS, _ROWS, "is_encoder_decoder")}
    return {name: value for name, value in values.items() if isinstance(value, (int, float)) and value}


def _refuse_what_cannot_be_told(name: str, config: dict[str, Any], forward: Forward | None) -> None:
    found = [f"{key} = {value}" for key, value in config.items() if key != "is_encoder_decoder" and value != 1]
    if forward is None and config.get("is_encoder_decoder"):
        found = found or ["the configuration of an encoder-decoder, some of which scale their hidden states"]
    if found:
        why = (
            f"the source of {name}.forward is not there" if forward is None else f"{name}.forward calls no head itself"
        )
        raise NotImplementedError(
            f"{why} to tell what becomes of {found[0]}; build the LMHead yourself, with logit_scale and softcap set as "
            f"the model applies them."
        )
