"""Refuse layers whose call is more than the product with their weight: codes, forwards of their own, hooks."""

import ast
import functools
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from fused_dpo.models.forward_source import parse
from fused_dpo.models.tensor_parallel import is_of_the_plan
from fused_dpo.validation import DTYPES

HEAD_FORWARD = "_fused_dpo_head"
"""Attribute, True, of a function that stands in for a head's forward and is ours: it reads the head, not changes it."""
_LEAVE_VALUES = ("torch.distributed.", "torch.utils.", "torch._dynamo.", "accelerate.", "deepspeed.")
"""Whose hooks gather, move, count or trace, and leave values as they are."""
_MOVING_HOOKS = ("AlignDevicesHook", "CpuOffload", "SequentialHook")
"""accelerate's, which replace a module's forward by one that moves weights and inputs."""
_CALLS_OF_LINEAR = ("F.linear", "nn.functional.linear", "torch.nn.functional.linear")


def refuse_quantised(base: Any) -> None:
    """Refuse a layer whose weight is not the numbers that multiply the hidden states."""
    name, weight = _name_of(base), getattr(base, "weight", None)
    if weight is None:
        raise NotImplementedError(f"the head is a {name}, which has no weight [V, D] to read (a quantised layer?).")
    packages = {type(thing).__module__.split(".")[0] for thing in (base, weight)}
    if weight.dtype not in DTYPES or packages & {"bitsandbytes", "torchao"}:
        raise NotImplementedError(
            f"the head is a {name}, whose weight is a quantised {type(weight).__name__} of {weight.dtype}, which the "
            f"kernels do not read; dequantise it with its scales, or quantise the model without its head "
            f"(llm_int8_skip_modules=['lm_head'] in bitsandbytes, modules_to_not_convert=['lm_head'] for fp8)."
        )


def refuse_own_forward(base: nn.Module) -> None:
    """Refuse a layer that does something else with its weight than `nn.Linear` does."""
    if isinstance(base, nn.Embedding) or not isinstance(base, nn.Module):  # its weight is the head by its owner's word
        return
    if not _is_linear(type(base)):
        raise NotImplementedError(
            f"the head is a {_name_of(base)}, whose forward is not nn.Linear's, so its weight does not say what its "
            f"logits are; build the LMHead yourself from the weight that it multiplies by."
        )


def refuse_replaced_forward(layer: Any) -> None:
    """Refuse a layer whose forward was replaced, but by ours, or by what is known to move weights and inputs.

    That is accelerate's hooks, and transformers' tensor parallelism.
    """
    own = forward_below_ours(layer)
    compiled = "_orig_mod" in getattr(layer, "_modules", {})  # torch.compile's wrapper has the compiled one there
    of_the_class = getattr(own, "__func__", None) is type(layer).forward  # as accelerate leaves it when it is taken off
    if own is None or compiled or of_the_class or is_of_the_plan(own):
        return
    hook = getattr(layer, "_hf_hook", None)
    for each in getattr(hook, "hooks", None) or [hook]:
        kinds = [cls.__name__ for cls in type(each).__mro__ if cls.__module__.startswith("accelerate.")]
        if not set(kinds) & set(_MOVING_HOOKS):
            raise NotImplementedError(
                f"the forward of the head ({_name_of(layer)}) was replaced by {_describe(own)}, which may change its "
                f"logits; take it off, or build the LMHead yourself."
            )


def forward_below_ours(layer: Any) -> Any:
    """Give what stands as `forward` on the layer itself, ours left out; None for nothing."""
    own = getattr(layer, "__dict__", {}).get("forward")
    while getattr(own, HEAD_FORWARD, False):
        own = getattr(own, "before", None)
    return own


def refuse_hooks(layer: Any) -> None:
    """Refuse hooks that may change what goes into or comes out of a head: the kernels do not call it.

    Those of FSDP, DeepSpeed and accelerate and of `torch.utils` are let through: they gather, move or count.
    """
    for hook in _hooks_of(layer):
        if not _module_of(hook).startswith(_LEAVE_VALUES):
            raise NotImplementedError(
                f"the head ({_name_of(layer)}) has a forward hook {_describe(hook)}, which the fused head would not "
                f"run; take it off, or apply what it does yourself and build the LMHead."
            )


def _hooks_of(layer: Any) -> Iterator[Any]:
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        yield from (getattr(layer, kind, None) or {}).values()


def _module_of(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


def _describe(function: Any) -> str:
    return f"{_module_of(function)}.{getattr(function, '__qualname__', type(function).__name__)}"


def _name_of(layer: Any) -> str:
    return f"{type(layer).__module__}.{type(layer).__name__}"


@cache
def _is_linear(cls: type) -> bool:
    """Tell whether the forward of a class is nn.Linear's, or reads `return F.linear(x, self.weight, self.bias)`."""
    forward: Any = getattr(cls, "forward", None)
    if forward is nn.Linear.forward:
        return True
    tree = None if forward is None else parse(forward)
    body = [] if tree is None else tree.body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):  # its docstring
        body = body[1:]
    if len(body) != 1 or not isinstance(body[0], ast.Return) or not isinstance(body[0].value, ast.Call):
        return False
    call = body[0].value
    given = [ast.unparse(each) for each in (*call.args, *(word.value for word in call.keywords))]
    return ast.unparse(call.func) in _CALLS_OF_LINEAR and given[1:] in (["self.weight"], ["self.weight", "self.bias"])
