"""The two operations as `torch.library` ops: opaque to `torch.compile`, with shapes it can trace and their gradients.

A fast implementation is chosen by name inside the op, so that autograd, fake tensors and errors are written once.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_dpo.head import LMHead, LowRankAdapter
from fused_dpo.linalg.matmul import accumulation_dtype
from fused_dpo.ops.dispatch import Filtering, exact, filtered, head_of_parts, scored_rows, shape_of_screen
from fused_dpo.stats import FilterStats, TokenStats

_NO_DOUBLE_BACKWARD = (
    "fused_dpo computes first derivatives only, so its backward cannot be differentiated (create_graph=True, "
    "torch.autograd.functional.hessian, gradient penalties); use options=KernelOptions(impl='reference') for those."
)


def token_logps(
    hidden: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    row_index: Tensor | None,
    head: LMHead,
    impl: str,
    workspace_mib: int,
    filtering: Filtering,
    *,
    want_stats: bool,
    keep_exponentials: bool = False,
) -> tuple[Tensor, TokenStats | None, FilterStats]:
    """Differentiable per-token log-probs of canonical inputs (see `fused_dpo.validation.Scoring`)."""
    lora = LowRankAdapter(*head.lora) if head.lora is not None else None
    # Which kernel runs must not hang on whether there will be a backward: another may round otherwise.
    keep = keep_exponentials and impl == "triton" and not (filtering.eps or want_stats or head.softcap)
    hold = keep and torch.is_grad_enabled() and head.weight.requires_grad and not torch.compiler.is_compiling()
    logps, state, _, stats, *_ = _token_logps_op(
        hidden,
        head.weight,
        head.bias,
        lora.a if lora else None,
        lora.b if lora else None,
        target,
        cu_seqlens,
        row_index,
        lora.scale if lora else 0.0,
        head.logit_scale,
        head.softcap or 0.0,
        head.temperature,
        impl,
        workspace_mib,
        *filtering,
        want_stats,
        keep,
        hold,
    )
    filter_stats = FilterStats(state[3], state[4]) if filtering.eps else nothing_filtered(target, logps.dtype)
    return logps, TokenStats(*stats.unbind(0)) if want_stats else None, filter_stats


def nothing_filtered(target: Tensor, dtype: torch.dtype) -> FilterStats:
    """The stats of an exact path."""
    kept = (target >= 0).to(dtype)
    return FilterStats(torch.zeros_like(kept), kept)


@torch.library.custom_op("fused_dpo::token_logps", mutates_args=())
def _token_logps_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    cu_seqlens: Tensor,
    row_index: Tensor | None,
    lora_scale: float,
    logit_scale: float,
    softcap: float,
    temperature: float,
    impl: str,
    workspace_mib: int,
    filter_eps: float,
    tail_guard: float,
    want_stats: bool,
    keep: bool,
    hold: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-prob [T], state of the softmax [3 or 5, T], the screen [blocks, 2, V], the stats stacked [3, T], and both
    parts of `Exponentials`.

    The screen and the stats are empty where they are not wanted, and the state is 5 rows where there is a screen. With
    `keep` it is the forward that can keep exponentials, and with `hold` it does; else they are empty.
    """
    head = head_of_parts(weight, bias, lora_a, lora_b, lora_scale, logit_scale, softcap, temperature)
    rows = scored_rows(target, row_index)
    gradient, shifts = weight.new_empty(0), hidden.new_empty(0, dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes here are chosen, not defaults to improve on
        if filter_eps:
            forward, _ = filtered(impl)
            filtering: dict[str, Any] = {"cu_seqlens": cu_seqlens, "filter_eps": filter_eps, "tail_guard": tail_guard}
            filtering["screen_shape"] = shape_of_screen(hidden, head, row_index, cu_seqlens, impl, workspace_mib)
            logps, state, stats, screen = forward(
                hidden, target, rows, head, workspace_mib, **filtering, want_stats=want_stats
            )
        else:
            forward, _ = exact(impl)
            if keep:
                from fused_dpo.gpu.exponentials import Exponentials
                from fused_dpo.gpu.forward import fused_scan

                exponentials = Exponentials.empty(hidden, rows, head, hold=hold)
                forward = partial(forward, scan=partial(fused_scan, exponentials=exponentials))
                if exponentials.rows:
                    gradient, shifts = exponentials
            logps, state, stats = forward(hidden, target, rows, head, workspace_mib, want_stats=want_stats)
            screen = torch.empty(0, 0, 0, dtype=torch.uint8, device=hidden.device)
    stacked = torch.stack(stats) if stats is not None else logps.new_empty(0)
    return logps, state, screen, stacked, gradient, shifts


@_token_logps_op.register_fake
def _(
    hidden, weight, bias, lora_a, lora_b, target, cu_seqlens, row_index,
    lora_scale, logit_scale, softcap, temperature, impl, workspace_mib, filter_eps, tail_guard, want_stats, keep, hold,
):  # fmt: skip
    del keep, hold  # of tensors without data nothing is kept
    per_row = hidden.new_empty(target.shape, dtype=accumulation_dtype(hidden.dtype))
    stats = per_row.new_empty((3, *target.shape) if want_stats else (0,))
    state = per_row.new_empty((5 if filter_eps else 3, *target.shape))
    screen = 0, 0, 0
    if filter_eps:
        head = head_of_parts(weight, bias, lora_a, lora_b, lora_scale, logit_scale, softcap, temperature)
        screen = shape_of_screen(hidden, head, row_index, cu_seqlens, impl, workspace_mib)
    kept = weight.new_empty(0), hidden.new_empty(0, dtype=torch.float32)
    return per_row, state, hidden.new_empty(screen, dtype=torch.uint8), stats, *kept


@torch.library.custom_op("fused_dpo::token_logps_backward", mutates_args=())
def _token_logps_backward_op(
    dlogps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    cu_seqlens: Tensor,
    row_index: Tensor | None,
    state: Tensor,
    screen: Tensor,
    lora_scale: float,
    logit_scale: float,
    softcap: float,
    temperature: float,
    impl: str,
    workspace_mib: int,
    filter_eps: float,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that `needs` (hidden, weight, bias, lora a, lora b) asks for, in that order."""
    return _gradients(
        dlogps, hidden, weight, bias, lora_a, lora_b, target, cu_seqlens, row_index, state, screen,
        lora_scale, logit_scale, softcap, temperature, impl, workspace_mib, filter_eps, needs,
    )  # fmt: skip


def _gradients(
    dlogps, hidden, weight, bias, lora_a, lora_b, target, cu_seqlens, row_index, state, screen,
    lora_scale, logit_scale, softcap, temperature, impl, workspace_mib, filter_eps, needs, kept=None,
) -> list[Tensor]:  # fmt: skip
    """What the operator returns; with `kept`, both parts of `Exponentials`, the weight's gradient is their memory."""
    head = head_of_parts(weight, bias, lora_a, lora_b, lora_scale, logit_scale, softcap, temperature)
    rows = scored_rows(target, row_index)
    wanted = needs[0], needs[1], needs[2], needs[3], needs[4]
    with torch.autocast(hidden.device.type, enabled=False):
        arguments = dlogps, hidden, target, rows, state, head, workspace_mib
        if filter_eps:
            filtering: dict[str, Any] = {"cu_seqlens": cu_seqlens, "screen": screen, "filter_eps": filter_eps}
            grads = filtered(impl)[1](*arguments, **filtering, needs=wanted)
        else:
            backward = exact(impl)[1]
            if kept is not None:
                from fused_dpo.gpu.backward_from_exponentials import DLogitsOfExponentials
                from fused_dpo.gpu.exponentials import Exponentials

                form_dlogits = partial(DLogitsOfExponentials, Exponentials(*kept))
                backward = partial(backward, form_dlogits=form_dlogits, dweight=kept[0])
            grads = backward(*arguments, needs=wanted)
    return [grad for grad in grads if grad is not None]


@_token_logps_backward_op.register_fake
def _(
    dlogps, hidden, weight, bias, lora_a, lora_b, target, cu_seqlens, row_index, state, screen,
    lora_scale, logit_scale, softcap, temperature, impl, workspace_mib, filter_eps, needs,
):  # fmt: skip
    inputs = (hidden, weight, bias, lora_a, lora_b)
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, needed in zip(inputs, needs, strict=True)
        if needed
    ]


def _setup_token_logps(ctx, inputs, output) -> None:
    tensors, ctx.settings = inputs[:8], inputs[8:15]  # up to filter_eps
    _, state, screen, stats, *kept = output
    ctx.save_for_backward(*tensors, state, screen)
    ctx.kept = kept if kept[0].numel() else None  # not saved: what is saved must not be written over
    ctx.mark_non_differentiable(state, screen, stats, *kept)
    ctx.set_materialize_grads(False)  # no zeros of the size of the screen for its gradient


def _token_logps_gradient(ctx, dlogps: Tensor, *_):
    needs = list(ctx.needs_input_grad[:5])
    arguments = dlogps, *ctx.saved_tensors, *ctx.settings, needs
    kept, ctx.kept = ctx.kept, None  # the gradient is written over it: another backward has to compute everything
    if kept is None or not needs[1] or torch.is_grad_enabled():
        grads = iter(_token_logps_backward_op(*arguments))
    else:  # no operator: one must not return what it was given
        grads = iter(_gradients(*arguments, kept=kept))
    return (*(next(grads) if needed else None for needed in needs), *[None] * 14)


def _refuse_double_backward(_ctx, *_grads):
    raise NotImplementedError(_NO_DOUBLE_BACKWARD)


_token_logps_op.register_autograd(_token_logps_gradient, setup_context=_setup_token_logps)
_token_logps_backward_op.register_autograd(_refuse_double_backward)
