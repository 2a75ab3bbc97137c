"""Derivatives other than those of `backward()`: whether a call is part of some, asked through torch's public names.

An operator of `torch.library` has a backward and no forward-mode formula. Torch then takes its results for constants:
their tangents are lost without a word. `torch.func` wraps tensors in levels, one a transform.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.func import debug_unwrap

_REFUSED = (
    "fused_dpo's kernels have a backward alone: forward-mode derivatives (torch.func.jvp, jacfwd, linearize, "
    "torch.autograd.forward_ad), torch.func.grad, vjp, jacrev and hessian, and vmap with gradients do not go through "
    "them. Use options=KernelOptions(impl='reference'), which has all of these, or .backward() and "
    "torch.autograd.grad outside of a transform."
)


def is_transformed(tensor: Tensor) -> bool:
    """Tell whether a tensor carries a tangent or belongs to a transform of `torch.func`.

    Code that is being compiled sees neither in what it is called with. There the answer is whether any may be around.
    """
    if unpack_dual(tensor).tangent is not None:
        return True
    return _any_derivative() if torch.compiler.is_compiling() else debug_unwrap(tensor) is not tensor


def is_batched(tensor: Tensor) -> bool:
    """Tell whether `vmap` runs over a tensor; False in code that is being compiled, which cannot know."""
    return not torch.compiler.is_compiling() and any(inner.ndim > outer.ndim for outer, inner in _levels(tensor))


def refuse_transforms(differentiable: Iterable[Tensor | None]) -> None:
    """Refuse a call whose derivatives would be lost, or end in an error of torch's that says nothing of a way out.

    `vmap` without gradients goes through the kernels, one call an element. So does what is constant to a transform.

    Raises:
        NotImplementedError: a tensor has a tangent, or `torch.func` differentiates it, or gradients are wanted in a
            transform, or a derivative of these kinds is around code that is being compiled.
    """
    tensors = [tensor for tensor in differentiable if isinstance(tensor, Tensor)]
    if torch.compiler.is_compiling():
        refused = any(is_transformed(tensor) for tensor in tensors)
    else:
        refused = any(unpack_dual(tensor).tangent is not None or _is_differentiated(tensor) for tensor in tensors)
        if not refused and torch.is_grad_enabled() and any(debug_unwrap(tensor).requires_grad for tensor in tensors):
            refused = _in_transform() or any(is_batched(tensor) for tensor in tensors)
    if refused:
        raise NotImplementedError(_REFUSED)


def _levels(tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Give each wrapper around a tensor with what is in it, outermost first; that of `vmap` hides a dimension."""
    while (inner := debug_unwrap(tensor, recurse=False)) is not tensor:
        yield tensor, inner
        tensor = inner


def _is_differentiated(tensor: Tensor) -> bool:
    return any(inner.ndim == outer.ndim for outer, inner in _levels(tensor))


def _in_transform() -> bool:
    """Tell whether a transform of `torch.func` that differentiates is at work: it wraps every tensor made in it."""
    made = torch.empty(0)
    return debug_unwrap(made) is not made


def _any_derivative() -> bool:
    """Tell whether such a transform is at work, or forward mode is on; asked once, when code is compiled.

    That is enough: torch compiles anew when a level of forward mode is entered or left, and within transforms of
    `torch.func` it runs compiled functions as they were.
    """
    if _in_transform():
        return True
    try:
        make_dual(torch.zeros(()), torch.zeros(()))
    except RuntimeError:  # no level is open
        return False
    return True


# What torch.compiler.assume_constant_result does; calling it here would load the compiler together with fused_dpo.
_any_derivative._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
