"""The two operations as `torch.library` ops: opaque to `torch.compile`, with shapes it can trace and their gradients.

A fast implementation is chosen by name inside the op, so that autograd, fake tensors and errors are written once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_dpo.head import HeadGrads, LMHead, LowRankAdapter
from fused_dpo.precision import accumulation_dtype
from fused_dpo.stats import TokenStats
from fused_dpo.streaming import streaming_backward, streaming_forward

_NO_DOUBLE_BACKWARD = (
    "fused_dpo computes first derivatives only, so its backward cannot be differentiated (create_graph=True, "
    "torch.autograd.functional.hessian, gradient penalties); use options=KernelOptions(impl='reference') for those."
)


def token_logps(
    hidden: Tensor,
    target: Tensor,
    row_index: Tensor | None,
    head: LMHead,
    impl: str,
    workspace_mib: int,
    *,
    want_stats: bool,
) -> tuple[Tensor, TokenStats | None]:
    """Differentiable per-token log-probs of canonical inputs (see `fused_dpo.validation.Scoring`)."""
    lora = LowRankAdapter(*head.lora) if head.lora is not None else None
    logps, _, stats = _token_logps_op(
        hidden,
        head.weight,
        head.bias,
        lora.a if lora else None,
        lora.b if lora else None,
        target,
        row_index,
        lora.scale if lora else 0.0,
        head.logit_scale,
        head.softcap or 0.0,
        head.temperature,
        impl,
        workspace_mib,
        want_stats,
    )
    return logps, TokenStats(*stats.unbind(0)) if want_stats else None


def _head(
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    logit_scale: float,
    softcap: float,
    temperature: float,
) -> LMHead:
    lora = None if lora_a is None or lora_b is None else LowRankAdapter(lora_a, lora_b, lora_scale)
    return LMHead(weight, bias, logit_scale, softcap or None, temperature, lora)


def _implementation(impl: str) -> tuple[Callable[..., Any], Callable[..., HeadGrads]]:
    """Forward and backward by name. Triton is imported on the first call that runs it."""
    if impl == "streaming":
        return streaming_forward, streaming_backward
    from fused_dpo.triton_backward import triton_backward
    from fused_dpo.triton_forward import triton_forward

    return triton_forward, triton_backward


def _scored_rows(target: Tensor, row_index: Tensor | None) -> Tensor:
    return (target >= 0).nonzero().squeeze(1) if row_index is None else row_index


@torch.library.custom_op("fused_dpo::token_logps", mutates_args=())
def _token_logps_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    row_index: Tensor | None,
    lora_scale: float,
    logit_scale: float,
    softcap: float,
    temperature: float,
    impl: str,
    workspace_mib: int,
    want_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob [T], state of the softmax [2, T], and the stats stacked [3, T] ([0] if not wanted)."""
    head = _head(weight, bias, lora_a, lora_b, lora_scale, logit_scale, softcap, temperature)
    rows = _scored_rows(target, row_index)
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes here are chosen, not defaults to improve on
        forward, _ = _implementation(impl)
        logps, state, stats = forward(hidden, target, rows, head, workspace_mib, want_stats=want_stats)
    return logps, state, torch.stack(stats) if stats is not None else logps.new_empty(0)


@_token_logps_op.register_fake
def _(
    hidden, weight, bias, lora_a, lora_b, target, row_index,
    lora_scale, logit_scale, softcap, temperature, impl, workspace_mib, want_stats,
):  # fmt: skip
    per_row = hidden.new_empty(target.shape, dtype=accumulation_dtype(hidden.dtype))
    stats = per_row.new_empty((3, *target.shape) if want_stats else (0,))
    return per_row, per_row.new_empty((2, *target.shape)), stats


@torch.library.custom_op("fused_dpo::token_logps_backward", mutates_args=())
def _token_logps_backward_op(
    dlogps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    row_index: Tensor | None,
    state: Tensor,
    lora_scale: float,
    logit_scale: float,
    softcap: float,
    temperature: float,
    impl: str,
    workspace_mib: int,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that `needs` (hidden, weight, bias, lora a, lora b) asks for, in that order."""
    head = _head(weight, bias, lora_a, lora_b, lora_scale, logit_scale, softcap, temperature)
    rows = _scored_rows(target, row_index)
    wanted = needs[0], needs[1], needs[2], needs[3], needs[4]
    with torch.autocast(hidden.device.type, enabled=False):
        _, backward = _implementation(impl)
        grads = backward(dlogps, hidden, target, rows, state, head, workspace_mib, needs=wanted)
    return [grad for grad in grads if grad is not None]


@_token_logps_backward_op.register_fake
def _(
    dlogps, hidden, weight, bias, lora_a, lora_b, target, row_index, state,
    lora_scale, logit_scale, softcap, temperature, impl, workspace_mib, needs,
):  # fmt: skip
    inputs = (hidden, weight, bias, lora_a, lora_b)
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, needed in zip(inputs, needs, strict=True)
        if needed
    ]


def _setup_token_logps(ctx, inputs, output) -> None:
    *tensors, ctx.lora_scale, ctx.logit_scale, ctx.softcap, ctx.temperature, ctx.impl, ctx.workspace_mib, _ = inputs
    _, state, stats = output
    ctx.save_for_backward(*tensors, state)
    ctx.mark_non_differentiable(state, stats)


def _token_logps_gradient(ctx, dlogps: Tensor, _dstate, _dstats):
    hidden, weight, bias, lora_a, lora_b, target, row_index, state = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    settings = ctx.lora_scale, ctx.logit_scale, ctx.softcap, ctx.temperature, ctx.impl, ctx.workspace_mib
    tensors = hidden, weight, bias, lora_a, lora_b, target, row_index, state
    grads = iter(_token_logps_backward_op(dlogps, *tensors, *settings, needs))
    return (*(next(grads) if needed else None for needed in needs), *[None] * 9)


def _refuse_double_backward(_ctx, *_grads):
    raise NotImplementedError(_NO_DOUBLE_BACKWARD)


_token_logps_op.register_autograd(_token_logps_gradient, setup_context=_setup_token_logps)
_token_logps_backward_op.register_autograd(_refuse_double_backward)


@torch.library.custom_op("fused_dpo::sequence_sum", mutates_args=())
def sequence_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums [N] of `values` [T] over the sequences `cu_seqlens` int64 [N+1]; an empty sequence gives 0.

    Added up in float64 and rounded once to the dtype of `values`: the result does not depend on how the rows of other
    sequences, or unscored rows (which are exactly 0), lie around it.
    """
    total = torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens, unsafe=True, initial=0.0)
    return total.to(values.dtype)


@sequence_sum.register_fake
def _(values, cu_seqlens):
    return values.new_empty(cu_seqlens.shape[0] - 1)


def _setup_sequence_sum(ctx, inputs, output) -> None:
    values, cu_seqlens = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.rows = values.shape[0]


def _sequence_sum_gradient(ctx, dsums: Tensor):
    (cu_seqlens,) = ctx.saved_tensors
    sequence_of_row = torch.bucketize(torch.arange(ctx.rows, device=dsums.device), cu_seqlens[1:], right=True)
    return dsums[sequence_of_row], None


sequence_sum.register_autograd(_sequence_sum_gradient, setup_context=_setup_sequence_sum)
