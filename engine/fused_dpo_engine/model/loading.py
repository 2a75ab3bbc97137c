"""Tokenizers and causal language models from folders or names, checked before anything is computed."""

import copy
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fused_dpo import head_of
from fused_dpo.hardware import has_bf16_units
from fused_dpo_engine.attention.interface import ATTENTION_NAME
from fused_dpo_engine.attention.models import check_packable, no_attention_of_ours, warn_of_lengths
from fused_dpo_engine.config.options import DataOptions, LoraOptions, ModelOptions, PackingOptions
from fused_dpo_engine.errors import UnsupportedModelError, UserError, first_line
from fused_dpo_engine.model.adapters import check_adapters
from fused_dpo_engine.model.compatibility import (
    causal_class_of,
    check_architecture,
    check_backbone,
    check_weights_left,
)
from fused_dpo_engine.model.dropout import Stated, stated_rates, switch_dropout_off
from fused_dpo_engine.model.quantisation import check_quantisation, loading_settings
from fused_dpo_engine.model.source import (
    TOKENIZER_FILES,
    Source,
    check_files,
    find_file,
    find_source,
    no_such_folder,
    read_config,
)

_FAILURES = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError, RuntimeError)
_WAY_OUT = "--no-packing trains it on padded batches."


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
    """Load the tokenizer of a model; of adapters that of their base, if they have none of their own.

    Raises:
        UserError: there is none.
    """
    source = find_source(name)
    settings: dict[str, Any] = {}
    if source.adapters is not None:
        own = any(find_file(source.adapters, file) for file in TOKENIZER_FILES)
        name = source.adapters if own else source.base
        settings = {"config": read_config(source, options)}  # tells which class it is, where the files do not
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code, **settings)
    except Exception as error:  # the libraries that read the files raise plain exceptions too
        raise UserError(
            f"no tokenizer could be loaded from {name}: {no_such_folder(name)}{first_line(error)} A model folder "
            f"needs the tokenizer files (tokenizer.json, tokenizer_config.json) beside the weights; save them there "
            f"with save_pretrained."
        ) from error


def check_model(options: ModelOptions, lora: LoraOptions, *, packing: bool = True) -> Source:
    """Find out from configurations alone, before any weights are loaded, whether a model can be trained.

    Returns:
        Where it comes from.

    Raises:
        UserError: it has another head, cannot be packed, is quantised and has no adapters to train, or comes with
            adapters that cannot be trained on.
    """
    source = find_source(options.model)
    config, _ = _checked_config(source, options, packing)
    if source.adapters is not None:
        check_adapters(source.adapters, lora)
    check_quantisation(config, options, lora)
    return source


def _checked_config(source: Source, options: ModelOptions, packing: bool) -> tuple[Any, type | None]:
    """Read a model's configuration, check its files and what it tells, and find the model's class if it tells that."""
    config = read_config(source, options)
    check_files(source)  # not before: of a name that the Hub does not know, each file takes as long to be missed
    check_architecture(config, source.base)
    cls = causal_class_of(config)
    if packing and cls is not None:
        _check_packable(cls, config)
    return config, cls


class LoadedModel(NamedTuple):
    """A model and what saving it has to know."""

    model: PreTrainedModel
    source: Source
    stated: list[Stated]
    """Values of its configuration that are others while training."""


def load_model(
    name: str, options: ModelOptions, dtype: torch.dtype, device: torch.device, *, packing: bool = True
) -> LoadedModel:
    """Load a causal language model (of adapters their base alone), find its parts, and switch dropout off.

    With `packing` it attends through `fused_dpo` and is checked to be packable, otherwise as transformers has it.

    Raises:
        UserError: it cannot be loaded, or its architecture cannot run packed.
    """
    source = find_source(name)
    own, cls = _checked_config(source, options, packing)
    config = copy.deepcopy(own)
    switch_dropout_off(config)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.base,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME if packing else _own_attention(config),
            trust_remote_code=options.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **loading_settings(config, options, dtype, device),
        )
        model, info = loaded
    except (*_FAILURES, SafetensorError) as error:
        if isinstance(error, KeyError) and error.args == (ATTENTION_NAME,):  # a table of attention classes
            name = cls.__name__ if cls else str(config.model_type)
            raise UnsupportedModelError(f"{no_attention_of_ours(name)} {_WAY_OUT}") from error
        raise UserError(
            f"no causal language model could be loaded from {source}: {no_such_folder(source.base)}{first_line(error)}"
        ) from error
    check_weights_left(info, source.base)
    if packing:
        _check_packable(type(model), model.config)
        warn_of_lengths(model.config)
    check_backbone(model)
    check_head_is_readable(model, name)
    if getattr(model, "hf_quantizer", None) is None:  # those of others were put there
        model.to(device)
    return LoadedModel(model, source, stated_rates(model.config, own))


def check_head_is_readable(model: Any, name: str) -> None:
    """Find out whether the kernels can read a model's head, its adapters included.

    Raises:
        UserError: they cannot.
    """
    try:
        head_of(model)
    except (NotImplementedError, TypeError) as error:
        raise UserError(f"{name}: {first_line(error)}") from error


def _check_packable(cls: type, config: Any) -> None:
    try:
        check_packable(cls, config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error} {_WAY_OUT}") from None


def _own_attention(config: Any) -> str | None:
    """Leave the choice to transformers, but no SDPA for a model with softcap: some releases leave the cap out."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def choose_max_length(model: ModelOptions, data: DataOptions, packing: PackingOptions) -> int:
    """Choose the longest sequence that `--max-length` means with this model.

    Raises:
        UserError: there is no such model, it has no configuration, or fewer positions.
    """
    config = read_config(find_source(model.model), model)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or packing.tokens_per_batch
    max_length = data.max_length or min(packing.tokens_per_batch // 2, longest)
    if max_length > longest:
        raise UserError(
            f"max-length {max_length} exceeds the {longest} positions that {model.model} has; give --max-length "
            f"{longest} or less."
        )
    return max_length
