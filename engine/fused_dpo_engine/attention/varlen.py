"""Packed attention through variable-length kernels: flash-attn 2, 3 and 4, and the one that torch brings along.

All take tokens in rows, `[T, H, head dim]`, and offsets of their own for queries and keys, and align the causal
diagonal bottom-right: the keys that a segment shares are gathered in front of its own. **None of this has run on a GPU
yet**; the tests check the arguments with stand-ins that compute the same in plain torch, and `verify_backend` compares
the kernel with `segment_attention` on the user's device before training.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_dpo_engine.attention.call import AttentionCall, Backend
from fused_dpo_engine.attention.gather import gather_rows
from fused_dpo_engine.attention.plan import AttentionPlan
from fused_dpo_engine.errors import UnsupportedModelError

FLASH_MODULES = {
    "flash_attn_2": "flash_attn",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute",
}
"""Where each release of flash-attn has its `flash_attn_varlen_func`."""


def flash_backend(function: Callable[..., Any]) -> Backend:
    """Make a backend of a `flash_attn_varlen_func` of flash-attn 2, 3 or 4, whose arguments go by the same names."""

    def attention(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, call: AttentionCall) -> Tensor:
        _refuse(sinks=call.sinks)
        q, k, v = _token_rows(query, key, value, plan)
        # Windows count the tokens before the token itself. Left out where there are none: releases differ in the value
        # that means so.
        optional: dict[str, Any] = {} if call.window is None else {"window_size": (call.window - 1, 0)}
        if call.softcap is not None:
            optional["softcap"] = call.softcap
        if torch.are_deterministic_algorithms_enabled():  # slower; torch's own kernel goes by the same switch
            optional["deterministic"] = True
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=plan.cu_q,
            cu_seqlens_k=plan.cu_k,
            max_seqlen_q=plan.max_q,
            max_seqlen_k=plan.max_k,
            softmax_scale=call.scaling,
            causal=True,
            **optional,
        )
        return (out[0] if isinstance(out, tuple) else out)[None]  # some releases return the log-sum-exp too

    return attention


def torch_backend(function: Callable[..., Any]) -> Backend:
    """Make a backend of `torch.nn.attention.varlen.varlen_attn`, whose arguments differ between releases of torch."""
    known = inspect.signature(function).parameters
    has_window, has_scale, has_groups = (name in known for name in ("window_size", "scale", "enable_gqa"))

    def attention(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, call: AttentionCall) -> Tensor:
        _refuse(sinks=call.sinks, softcap=call.softcap, window=None if has_window else call.window)
        q, k, v = _token_rows(query, key, value, plan)
        options: dict[str, Any] = {}
        if has_window:
            options["window_size"] = (-1 if call.window is None else call.window - 1, 0)
        else:
            options["is_causal"] = True
        if has_scale:
            options["scale"] = call.scaling
        else:
            q = q * (call.scaling * q.shape[-1] ** 0.5)
        groups = q.shape[1] // k.shape[1]
        if groups > 1 and has_groups:
            options["enable_gqa"] = True
        elif groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return function(q, k, v, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, **options)[None]

    return attention


def load_varlen(name: str) -> Backend:
    """Import the package of a variable-length kernel, and give its backend.

    Raises:
        ImportError: the package is not there, or does not work here.
    """
    if name == "varlen":
        return torch_backend(importlib.import_module("torch.nn.attention.varlen").varlen_attn)
    return flash_backend(importlib.import_module(FLASH_MODULES[name]).flash_attn_varlen_func)


def _refuse(**unknown: object) -> None:
    """Refuse what a model's configuration did not tell of, and a kernel would leave out silently."""
    asked = [name for name, value in unknown.items() if value is not None]
    if asked:
        raise UnsupportedModelError(
            f"a layer asks for {' and '.join(asked)}, which this attention kernel does not have; give --attention flex."
        )


def _token_rows(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor, Tensor]:
    # Under autocast rotary embeddings and norms may hand over fp32 queries and keys; kernels take one half dtype.
    q, k, v = (tensor.to(value.dtype)[0].transpose(0, 1) for tensor in (query, key, value))
    if plan.kv_index is None:
        return q, k, v
    return q, gather_rows(k, plan.kv_index), gather_rows(v, plan.kv_index)
