"""Find the plain layer of a head below what wraps it, and the low-rank adapter that is active on it."""

from typing import Any

from torch import nn

from fused_dpo.head import LowRankAdapter

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Where `torch.compile`, `checkpoint_wrapper` and FSDP1 keep the module that they wrap."""


def unwrapped(module: Any) -> Any:
    """Give the module below `torch.compile`, activation checkpointing and FSDP1."""
    while isinstance(module, nn.Module):
        parts = module._modules
        name = next((name for name in _WRAPPERS if name in parts), None)
        if name is None:
            break
        module = parts[name]
    return module


def read_adapter(layer: Any) -> tuple[Any, LowRankAdapter | None]:
    """Find the plain layer below `peft`'s, and the one LoRA adapter that is active on it, if any.

    peft's layers are known by what they hold, as others swap their class (`fully_shard`) or derive from it.

    Raises:
        NotImplementedError: another adapter than LoRA, a variant of it, several active ones, or dropout in training.
    """
    layer = unwrapped(layer)
    if hasattr(layer, "modules_to_save"):  # peft's ModulesToSaveWrapper: a full copy that is trained instead
        active = layer.active_adapters[0] if layer.active_adapters else None
        copied = not layer.disable_adapters and active in layer.modules_to_save
        return unwrapped(layer.modules_to_save[active] if copied else layer.original_module), None
    if not _holds_adapters(layer):
        return layer, None
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else _below(layer)
    base = unwrapped(base)
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        return base, None
    own_forward = not str(type(layer).forward.__module__).startswith("peft.")  # a subclass may do something else
    if own_forward or not hasattr(layer, "lora_A") or hasattr(layer, "lora_E"):
        raise NotImplementedError(
            f"the head carries an adapter of type {type(layer).__module__}.{type(layer).__name__}, which is not peft's "
            f"LoRA; merge it into the weight, or leave the head out of the adapter's modules."
        )
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return base, None
    if len(active) > 1:
        raise NotImplementedError(f"the head has {len(active)} active adapters {active}; merge them or activate one.")
    name = active[0]
    _refuse_variants(layer, name)
    return base, LowRankAdapter(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))


def _holds_adapters(layer: Any) -> bool:
    """Tell whether a layer is one of peft's, or made like one."""
    if any(hasattr(layer, name) for name in ("base_layer", "get_base_layer", "original_module", "lora_A")):
        return True
    return any(cls.__module__.startswith("peft.") for cls in type(layer).__mro__)


def _below(layer: Any) -> Any:
    for name in ("base_layer", "original_module"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise NotImplementedError(
        f"the head carries an adapter of type {type(layer).__module__}.{type(layer).__name__}, whose weight is not "
        f"found; merge it into the weight, or leave the head out of the adapter's modules."
    )


def _refuse_variants(layer: Any, name: str) -> None:
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
