"""liger-kernel's RMSNorm, rotary embedding and gated MLP in the backbone; never its cross-entropy, the head is ours."""

from typing import Any

import torch

from fused_dpo_engine.errors import UserError


def apply_liger(model: Any, device: torch.device) -> None:
    """Patch a `transformers` model in place with liger-kernel's backbone kernels.

    The rotary embedding is replaced in transformers' own module, so for every model of this type in the process.

    Args:
        model: a causal language model, not yet wrapped by `peft`.
        device: that it computes on.

    Raises:
        UserError: no CUDA device, no liger-kernel, or a model type that it does not know.
    """
    if device.type != "cuda":
        raise UserError(f"--liger needs a CUDA device, this run is on {device.type}; leave --liger out.")
    try:
        from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
            MODEL_TYPE_TO_APPLY_LIGER_FN,
            _apply_liger_kernel_to_instance,
        )
    except ImportError as error:
        raise UserError(
            f"--liger: {error}; install it, or a later release of it, with pip install -U 'fused-dpo[liger]'."
        ) from error
    model_type = model.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(
            f"--liger: liger-kernel has nothing for model type {model_type!r}; leave --liger out, or take one of "
            f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}."
        )
    # It passes on what its function for this model type takes; both losses are on by default in one or the other.
    _apply_liger_kernel_to_instance(
        model=model,
        rope=_rotates_whole_heads(model.config),
        rms_norm=True,
        swiglu=True,
        geglu=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )


def _rotates_whole_heads(config: Any) -> bool:
    """Tell whether the rotary embedding turns all of a head's width, as liger-kernel's takes for granted.

    Phi-4-mini's does not. The patch is for the whole process, so its mistake would be on both sides of the set-up test.
    """
    config = config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    factors = [part.get("partial_rotary_factor", 1.0) for part in nested]
    return {*factors, getattr(config, "partial_rotary_factor", None) or 1.0} == {1.0}
