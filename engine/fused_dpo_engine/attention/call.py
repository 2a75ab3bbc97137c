"""What an attention layer asks for, in the words that every backend takes."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_dpo_engine.attention.plan import AttentionPlan


class AttentionCall(NamedTuple):
    """Settings of one layer's attention."""

    scaling: float
    """Factor on the scores."""
    window: int | None = None
    """A token sees itself and the `window - 1` tokens before it; None for all before it."""
    softcap: float | None = None
    """Bound of the scores, `softcap * tanh(scores / softcap)` (Gemma 2)."""
    sinks: Tensor | None = None
    """[H], scores of a key with the value 0 that every token sees (gpt-oss)."""


Backend = Callable[[Tensor, Tensor, Tensor, AttentionPlan, AttentionCall], Tensor]
"""(query [1, H, T, D], key [1, H_kv, T, D], value [1, H_kv, T, D_v], plan, call) -> [1, T, H, D_v]."""

Function = TypeVar("Function", bound=Callable[..., Any])


def not_traced(function: Function) -> Function:
    """Keep `torch.compile` out of a function: what is in it differs from batch to batch."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]
