"""Weights of few bits: what has to hold for a model to be trained on them, and --load-in-4bit."""

from importlib.util import find_spec
from typing import Any

import torch

from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.errors import UserError

_NEEDS = ("bitsandbytes", "accelerate")


def check_quantisation(config: Any, options: ModelOptions, lora: LoraOptions) -> None:
    """Find out from a model's configuration whether its weights can be trained as the options say.

    Raises:
        UserError: they are quantised by bitsandbytes, or to be, and there are no adapters to train or no bitsandbytes;
            or --load-in-4bit is to quantise what is quantised.
    """
    method = _method(config)
    if method is not None and options.load_in_4bit:
        raise UserError(f"the weights of {options.model} are quantised already ({method}); leave --load-in-4bit out.")
    if method != "bitsandbytes" and not options.load_in_4bit:
        return
    if not lora.lora_rank:
        raise UserError(_cannot_be_trained(options.model, method or "--load-in-4bit"))
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        what = "--load-in-4bit" if options.load_in_4bit else f"{options.model}, whose weights bitsandbytes quantised,"
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install 'fused-dpo[qlora]'.")


def check_loaded(model: Any, name: str, *, trained: bool, adapters: bool) -> None:
    """Find out whether the weights that were loaded can be trained; some methods dequantise them on the way.

    Raises:
        UserError: they are quantised, and there are no adapters to train, or its method trains none.
    """
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is None or not trained:
        return
    method = _method(model.config) or type(quantiser).__name__
    if not adapters:
        raise UserError(_cannot_be_trained(name, method))
    if not quantiser.is_trainable:
        raise UserError(
            f"the weights of {name} are quantised by {method}, which takes no gradients, not even for adapters; give a "
            f"model that is not quantised, with --load-in-4bit to keep it small."
        )


def loading_settings(config: Any, options: ModelOptions, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Give what `from_pretrained` takes to load quantised weights, or to quantise them; nothing for others."""
    if options.load_in_4bit:
        from transformers import BitsAndBytesConfig

        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        return {"quantization_config": quantisation, "device_map": {"": device}}
    if _method(config) is None or find_spec("accelerate") is None:  # which places them
        return {}
    return {"device_map": {"": device}}


def _cannot_be_trained(name: str, method: str) -> str:
    return (
        f"quantised weights cannot be trained ({method}, {name}); give --lora-rank, which trains adapters on them, or "
        f"a model that is not quantised."
    )


def _method(config: Any) -> str | None:
    """Name the method by which a configuration says that the weights are quantised."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found:
            settings = found if isinstance(found, dict) else found.to_dict()
            by_bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")
            method = settings.get("quant_method") or ("bitsandbytes" if by_bits else "unknown")
            return str(getattr(method, "value", method))
    return None
