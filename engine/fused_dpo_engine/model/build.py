"""Load the model to train, choose its attention, put adapters on it, and wrap it as a policy."""

from typing import Any

import torch

from fused_dpo_engine.attention.models import attention_for
from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.adapters import add_adapters, load_adapters, merge_adapters
from fused_dpo_engine.model.finite import first_not_finite
from fused_dpo_engine.model.layers import checkpoint_layers
from fused_dpo_engine.model.liger import apply_liger
from fused_dpo_engine.model.loading import check_head_is_readable, check_model, choose_dtype, load_model
from fused_dpo_engine.model.offload import ActivationOffload
from fused_dpo_engine.model.policy import Policy
from fused_dpo_engine.model.quantisation import check_loaded
from fused_dpo_engine.model.router_loss import router_loss_of
from fused_dpo_engine.model.source import Source


def build_policy(
    options: ModelOptions,
    lora: LoraOptions,
    device: torch.device,
    *,
    ld_alpha: float | None = None,
    packing: bool = True,
    trained: bool = True,
    loaded_on: torch.device | None = None,
) -> Policy:
    """Load the model to train: fp32 weights, computed in `options.dtype`, or adapters on a frozen model in it.

    Adapters that the model comes with are merged into fp32 weights, or with `lora` trained on.

    Args:
        options: the model.
        lora: adapters to train.
        device: that it computes on.
        ld_alpha: see `Policy`.
        packing: attend through `fused_dpo`.
        trained: False for a reference, which may be quantised.
        loaded_on: where the weights are put for now; None for `device`.

    Raises:
        UserError: the model cannot be loaded or trained so, or one of its weights is not finite.
    """
    compute_dtype = choose_dtype(options, device)
    if trained:
        check_model(options, lora, packing=packing)
    weights_dtype = compute_dtype if lora.lora_rank else torch.float32
    model: Any
    at_first = loaded_on or device
    model, source, stated = load_model(options.model, options, weights_dtype, at_first, packing=packing)
    check_loaded(model, source.base, trained=trained, adapters=lora.lora_rank > 0)
    attention_name = attention_for(model, device, compute_dtype, options.attention) if packing else "sdpa"
    if options.liger:
        apply_liger(model, device)
    if options.gradient_checkpointing:
        checkpoint_layers(model)
    router_loss, router_line = router_loss_of(model)
    if source.adapters is not None and (lora.lora_rank or getattr(model, "hf_quantizer", None) is not None):
        model, rates = load_adapters(model, source, at_first, trainable=trained)
        stated = stated + rates
    elif source.adapters is not None:
        model = merge_adapters(model, source, at_first)
    elif lora.lora_rank:
        model = add_adapters(model, source.base, lora)
    model.train()
    offload = None
    if options.offload_activations and trained:
        offload = ActivationOffload(model.parameters(), model.config.get_text_config().hidden_size)
    check_head_is_readable(model, options.model)
    if broken := first_not_finite(model.named_parameters()):
        raise UserError(
            f"{options.model}: the weight {broken} holds numbers that are not finite. Its file is damaged, or was "
            f"saved after training had diverged; take another checkpoint."
        )
    return Policy(
        model,
        compute_dtype,
        workspace_mib=options.workspace_mib,
        ld_alpha=ld_alpha,
        attention_name=attention_name,
        grad_mode=None if options.grad_mode == "auto" else options.grad_mode,
        router_loss=router_loss,
        offload=offload,
        stated=stated,
        reference_has_adapters=source.adapters is not None,
        notes=[note for note in (_adapters_line(source, lora), router_line) if note],
    )


def _adapters_line(source: Source, lora: LoraOptions) -> str | None:
    """Say what became of the adapters that a model came with."""
    if source.adapters is None:
        return None
    fate = "trained on" if lora.lora_rank else "merged into it, and all weights are trained"
    return f"adapters: those of {source.adapters} on {source.base}, {fate}; the reference has them too"
