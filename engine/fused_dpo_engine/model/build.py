"""Load the model to train, choose its attention, put adapters on it, and wrap it as a policy."""

import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fused_dpo_engine.attention.choice import available_backends, candidates, load_backend
from fused_dpo_engine.attention.verify import verify_backend
from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.errors import UserError, first_line
from fused_dpo_engine.model.compatibility import attention_needs
from fused_dpo_engine.model.liger import apply_liger
from fused_dpo_engine.model.loading import choose_dtype, load_model
from fused_dpo_engine.model.policy import Policy


def attention_for(model: Any, device: torch.device, dtype: torch.dtype, wanted: str) -> str:
    """Name of the attention backend for a model's packed rows on this device; `wanted` as in `ModelOptions`.

    Raises:
        UserError: the one that is wanted is not there, cannot serve the model, fails or computes something else. Of
            those that nobody asked for by name, such a one is passed over with a warning.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    needs = attention_needs(model)
    names = candidates(needs, device, dtype, capability, available_backends(), wanted)
    for name in names:
        if name == "sdpa":  # what the others are compared with
            break
        try:
            verify_backend(name, load_backend(name), needs, device, dtype)
        except UserError as reason:
            if wanted != "auto":
                raise
            warnings.warn(f"passed over: {reason}", stacklevel=2)
        else:
            return name
    return "sdpa"


def build_policy(
    options: ModelOptions,
    lora: LoraOptions,
    device: torch.device,
    *,
    ld_alpha: float | None = None,
    packing: bool = True,
) -> Policy:
    """Load the model to train: fp32 weights, computed in `options.dtype`, or adapters on a frozen model in it."""
    compute_dtype = choose_dtype(options, device)
    weights_dtype = compute_dtype if lora.lora_rank else torch.float32
    model: Any = load_model(options.model, options, weights_dtype, device, packing=packing)
    attention_name = attention_for(model, device, compute_dtype, options.attention) if packing else "sdpa"
    if options.liger:
        apply_liger(model, device)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora.lora_rank:
        model = _with_adapters(model, lora)
    model.train()
    return Policy(
        model,
        compute_dtype,
        workspace_mib=options.workspace_mib,
        ld_alpha=ld_alpha,
        attention_name=attention_name,
        grad_mode=None if options.grad_mode == "auto" else options.grad_mode,
    )


def _with_adapters(model: PreTrainedModel, lora: LoraOptions) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = list(lora.lora_target_modules)
    config = LoraConfig(
        r=lora.lora_rank,
        lora_alpha=2 * lora.lora_rank if lora.lora_alpha is None else lora.lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora-target-modules {' '.join(targets)}: {first_line(error)}") from error
