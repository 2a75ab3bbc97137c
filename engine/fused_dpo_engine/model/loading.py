"""Tokenizers and causal language models from folders or names, checked before anything is computed."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fused_dpo import head_of
from fused_dpo.hardware import has_bf16_units
from fused_dpo_engine.attention.interface import ATTENTION_NAME
from fused_dpo_engine.config.options import DataOptions, ModelOptions, PackingOptions
from fused_dpo_engine.errors import UserError, first_line
from fused_dpo_engine.model.compatibility import backbone_of, check_packable


def choose_device(options: ModelOptions) -> torch.device:
    """Choose the device that `--device` means here."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; use --device cpu or install a CUDA build.")
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(options.device)


def choose_dtype(options: ModelOptions, device: torch.device) -> torch.dtype:
    """Tell which compute dtype `--dtype` means on this device.

    Raises:
        UserError: the environment masks the CPU's units by a name that oneDNN does not know.
    """
    if options.dtype == "auto":
        return torch.bfloat16 if _has_bf16_units(device) else torch.float32
    return getattr(torch, options.dtype)


def dtype_warning(options: ModelOptions, device: torch.device) -> str | None:
    """Say what a dtype costs that was asked for on a CPU without units for it; None on any other device.

    Raises:
        UserError: as in `choose_dtype`.
    """
    if options.dtype != "bfloat16" or device.type != "cpu" or _has_bf16_units(device):
        return None
    return (
        "warning: --dtype bfloat16, but this CPU has no bf16 units that torch may use (AVX512-BF16 or AMX): "
        "products of bf16 matrices take up to a hundred times as long as those of float32; --dtype float32 is what "
        "auto takes"
    )


def _has_bf16_units(device: torch.device) -> bool:
    try:
        return has_bf16_units(device)
    except ValueError as error:
        raise UserError(str(error)) from None


def load_tokenizer(name: str, options: ModelOptions) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        UserError: there is none.
    """
    check_source(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise UserError(
            f"no tokenizer could be loaded from {name}: {no_such_folder(name)}{first_line(error)} A model folder "
            f"needs the tokenizer files (tokenizer.json, tokenizer_config.json) beside the weights; save them there "
            f"with save_pretrained."
        ) from error


def load_model(
    name: str, options: ModelOptions, dtype: torch.dtype, device: torch.device, *, packing: bool = True
) -> PreTrainedModel:
    """Load a causal language model, find its parts, and switch dropout off.

    With `packing` it attends through `fused_dpo` and is checked to be packable, otherwise as transformers has it.

    Raises:
        UserError: it cannot be loaded, or its architecture cannot run packed.
    """
    check_source(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code)
        _switch_dropout_off(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME if packing else _own_attention(config),
            trust_remote_code=options.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, info = loaded
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"no causal language model could be loaded from {name}: {no_such_folder(name)}{first_line(error)}"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"the weights in {name} lack {len(missing)} tensors that its configuration asks for, such as {missing[0]}; "
            f"they would be random."
        )
    if packing:
        check_packable(model)
    backbone_of(model)
    try:
        head_of(model)
    except (NotImplementedError, TypeError) as error:
        raise UserError(f"{name}: {first_line(error)}") from error
    return model.to(device)


def _own_attention(config: Any) -> str | None:
    """Leave the choice to transformers, but no SDPA for a model with softcap: some releases leave the cap out."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def _switch_dropout_off(config: Any) -> None:
    """Set every dropout rate of a configuration to 0: policy and reference have to be the same function."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or name.endswith("pdrop")):
                setattr(part, name, 0.0)


def check_source(name: str) -> None:
    """Refuse a model's name that can only be a folder, if there is none.

    Raises:
        UserError: there is none.
    """
    if not name:
        raise UserError("a model needs a name: give --model (or --ref-model) a folder or a Hugging Face name.")
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise UserError(f"model folder {name} does not exist.")


def no_such_folder(name: str) -> str:
    """Say that there is no such folder, where loading failed: mistyped, it looks like a name on the Hub."""
    return f"there is no such folder {name}, nor could the Hub help: " if not Path(name).is_dir() else ""


def choose_max_length(model: ModelOptions, data: DataOptions, packing: PackingOptions) -> int:
    """Choose the longest sequence that `--max-length` means with this model.

    Raises:
        UserError: there is no such model, it has no configuration, or fewer positions.
    """
    check_source(model.model)
    try:
        config = AutoConfig.from_pretrained(model.model, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no model configuration could be read from {model.model}: {no_such_folder(model.model)}{first_line(error)}"
        ) from error
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or packing.tokens_per_batch
    max_length = data.max_length or min(packing.tokens_per_batch // 2, longest)
    if max_length > longest:
        raise UserError(
            f"max-length {max_length} exceeds the {longest} positions that {model.model} has; give --max-length "
            f"{longest} or less."
        )
    return max_length
