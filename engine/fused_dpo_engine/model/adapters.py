"""LoRA adapters: new ones on a model, or those of a folder, trained on or merged into their base."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from fused_dpo_engine.config.options import LoraOptions
from fused_dpo_engine.errors import UserError, first_line
from fused_dpo_engine.model.dropout import Stated
from fused_dpo_engine.model.source import Source

_ALL_LINEAR = ["all-linear"]
_FAILURES = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError)


def check_adapters(adapters: str, lora: LoraOptions) -> None:
    """Find out from the configuration of adapters whether they can be trained on as the options say, or merged.

    Raises:
        UserError: they belong to another task, change no weights, or differ from what --lora-rank, --lora-alpha or
            --lora-target-modules say.
    """
    config = _config_of(adapters)
    task = str(getattr(config.task_type, "value", config.task_type))
    if config.task_type is not None and task != "CAUSAL_LM":
        raise UserError(f"the adapters in {adapters} are for the task {task}; only CAUSAL_LM is trained here.")
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        raise UserError(f"the adapters in {adapters} are {kind}: tokens before the prompt, not a change of weights.")
    if not lora.lora_rank:
        return
    way_out = f"leave --lora-rank out, which merges them into their base and trains all weights, or {_merge_first()}"
    if kind != "LORA":
        raise UserError(f"the adapters in {adapters} are {kind}, of which --lora-rank trains no more; {way_out}.")
    if config.r != lora.lora_rank:
        raise UserError(
            f"the adapters in {adapters} have rank {config.r}: --lora-rank {config.r} trains them on; for other ranks "
            f"{_merge_first()}."
        )
    if lora.lora_alpha not in (None, config.lora_alpha):
        raise UserError(
            f"the adapters in {adapters} have lora-alpha {config.lora_alpha}; leave --lora-alpha out, or "
            f"{_merge_first()}."
        )
    targets = list(lora.lora_target_modules)
    theirs = config.target_modules
    if targets != _ALL_LINEAR and (not isinstance(theirs, (set, list, tuple)) or set(targets) != set(theirs)):
        names = theirs if isinstance(theirs, str) else " ".join(sorted(theirs or ()))
        raise UserError(
            f"the adapters in {adapters} are on {names}; leave --lora-target-modules out, or {_merge_first()}."
        )


def load_adapters(model: Any, source: Source, device: torch.device, *, trainable: bool) -> tuple[Any, list[Stated]]:
    """Put the adapters of a folder or name on the base that they name.

    Returns:
        The model with its adapters, and what their configuration says of dropout, which is off.

    Raises:
        UserError: they cannot be loaded, or do not fit.
    """
    from peft import PeftModel

    adapters = str(source.adapters)
    config: Any = _config_of(adapters)
    stated = [Stated(config, "lora_dropout", config.lora_dropout)] if hasattr(config, "lora_dropout") else []
    for part, name, _ in stated:
        setattr(part, name, 0.0)
    config.base_model_name_or_path = _lasting(source.base)
    config.inference_mode = not trainable
    try:
        loaded = PeftModel.from_pretrained(
            model, adapters, config=config, is_trainable=trainable, torch_device=str(device)
        )
    except _FAILURES as error:
        raise UserError(f"the adapters in {adapters} do not go on {source.base}: {first_line(error)}") from error
    for parameter in loaded.parameters():
        if parameter.requires_grad:  # whole modules that are trained come in the dtype of the base
            parameter.data = parameter.data.float()
    return loaded, stated


def merge_adapters(model: Any, source: Source, device: torch.device) -> PreTrainedModel:
    """Add the adapters of a folder or name to the weights of their base.

    Raises:
        UserError: they cannot be loaded, do not fit, or are of a kind that cannot be merged.
    """
    loaded, _ = load_adapters(model, source, device, trainable=False)
    _untie_if_adapted(loaded.get_base_model())
    try:
        merged = loaded.merge_and_unload()
    except _FAILURES as error:
        raise UserError(
            f"the adapters in {source.adapters} cannot be merged into {source.base}: {first_line(error)}"
        ) from error
    if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False  # what is saved has two weights
    merged.requires_grad_(True)
    return merged


def _untie_if_adapted(model: Any) -> None:
    """Give the head a weight of its own if it or the embeddings have adapters: merged, these would change both."""
    layers = model.get_output_embeddings(), model.get_input_embeddings()
    head, embeddings = (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in layers)
    adapted = any(type(layer).__module__.startswith("peft.") for layer in layers)
    if adapted and getattr(head, "weight", None) is getattr(embeddings, "weight", None) is not None:
        head.weight = nn.Parameter(head.weight.detach().clone())


def add_adapters(model: PreTrainedModel, base: str, lora: LoraOptions) -> nn.Module:
    """Put new adapters on a model; what is saved names `base`, and a folder by its whole path.

    Raises:
        UserError: the model has no such modules.
    """
    from peft import LoraConfig, get_peft_model

    targets = list(lora.lora_target_modules)
    config = LoraConfig(
        r=lora.lora_rank,
        lora_alpha=2 * lora.lora_rank if lora.lora_alpha is None else lora.lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=targets[0] if targets == _ALL_LINEAR else targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora-target-modules {' '.join(targets)}: {first_line(error)}") from error
    config.base_model_name_or_path = _lasting(base)
    return wrapped


def _config_of(adapters: str) -> Any:
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(adapters)
    except _FAILURES as error:
        raise UserError(
            f"the configuration of the adapters in {adapters} cannot be read: {first_line(error)}"
        ) from error


def _lasting(base: str) -> str:
    """Name a base so that it is found from any folder."""
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def _merge_first() -> str:
    return "merge them first (merge_and_unload of peft), and give --model the result"
