"""Per-token log-probs as an operator of `torch.library`: opaque to `torch.compile`, with its shapes and gradients.

The implementation is chosen by name inside the operator, so that autograd, fake tensors and errors are written once.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from fused_dpo.filtering import Filtering
from fused_dpo.head import HeadInputs, LMHead, LowRankAdapter, Needs, VocabShard
from fused_dpo.linalg.matmul import accumulation_dtype
from fused_dpo.ops.dispatch import (
    run_exact_backward,
    run_exact_forward,
    run_filtered_backward,
    run_filtered_forward,
    shape_of_screen,
)
from fused_dpo.stats import FilterStats, SoftmaxState, TokenStats

if TYPE_CHECKING:
    from fused_dpo.gpu.exponentials import Exponentials

_NO_DOUBLE_BACKWARD = (
    "fused_dpo computes first derivatives only, so its backward cannot be differentiated (create_graph=True, "
    "torch.autograd.functional.hessian, gradient penalties); use options=KernelOptions(impl='reference') for those."
)


class Arguments(NamedTuple):
    """What the operator takes, as operators can take it: tensors first, those with gradients before the others."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    target: Tensor
    cu_seqlens: Tensor
    row_index: Tensor | None
    lora_scale: float
    logit_scale: float
    softcap: float
    """0 for none."""
    temperature: float
    impl: str
    workspace_mib: int
    filter_eps: float
    tail_guard: float
    want_stats: bool
    exponentials_kernel: bool
    """Run the forward that can save exponentials, whether or not it does: another may round otherwise."""
    save: bool
    """Save them, as there will be a backward."""
    vocab_first: int
    """See `VocabShard`, whose fields follow; a head that is whole names no group."""
    vocab_size: int
    vocab_most: int
    vocab_group: str

    @property
    def head(self) -> LMHead:
        """The head, put together again."""
        lora = None
        if self.lora_a is not None and self.lora_b is not None:
            lora = LowRankAdapter(self.lora_a, self.lora_b, self.lora_scale)
        return LMHead(self.weight, self.bias, self.logit_scale, self.softcap or None, self.temperature, lora)

    @property
    def shard(self) -> VocabShard | None:
        """Which part of the vocabulary is here, None if all of it is."""
        whole = not self.vocab_group
        return None if whole else VocabShard(self.vocab_first, self.vocab_size, self.vocab_most, self.vocab_group)

    @property
    def inputs(self) -> HeadInputs:
        """What an implementation takes; finding the scored rows waits for the device, unless they are given."""
        rows = (self.target >= 0).nonzero().squeeze(1) if self.row_index is None else self.row_index.contiguous()
        target, V = self.target, self.weight.shape[0]
        if self.shard is not None:
            target = target - self.shard.first
            target = target.masked_fill((target < 0) | (target >= V), V)
        return HeadInputs(self.hidden, target, rows, self.head, self.workspace_mib, self.shard)

    @property
    def filtering(self) -> Filtering:
        """What the gradients may leave out."""
        return Filtering(self.filter_eps, self.tail_guard)

    @property
    def screen_shape(self) -> tuple[int, int, int]:
        """Shape of the screen, as if all rows that may be scored were scored."""
        if not self.filter_eps:
            return 0, 0, 0
        may_be_scored = self.target if self.row_index is None else self.row_index
        inputs = HeadInputs(self.hidden, self.target, may_be_scored, self.head, self.workspace_mib, self.shard)
        return shape_of_screen(self.impl, inputs, may_be_scored.shape[0], self.cu_seqlens)

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The arguments that `Needs` is about."""
        return self.hidden, *self.head.differentiable


_TENSORS = Arguments._fields.index("lora_scale")
"""Arguments that are tensors; what follows is settings."""
_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "SymInt", str: "str", bool: "bool"}
_PARAMETERS = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(Arguments).items())


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
    reuse_exponentials: bool = False,
    shard: VocabShard | None = None,
) -> tuple[Tensor, TokenStats | None, FilterStats]:
    """Compute differentiable per-token log-probs of canonical inputs (see `fused_dpo.validation.Scoring`)."""
    lora = LowRankAdapter(*head.lora) if head.lora is not None else None
    exponentials_kernel = reuse_exponentials and impl == "triton" and not (filtering.eps or want_stats or head.softcap)
    will_be_differentiated = torch.is_grad_enabled() and head.weight.requires_grad
    arguments = Arguments(
        hidden=hidden,
        weight=head.weight,
        bias=head.bias,
        lora_a=lora.a if lora else None,
        lora_b=lora.b if lora else None,
        target=target,
        cu_seqlens=cu_seqlens,
        row_index=row_index,
        lora_scale=lora.scale if lora else 0.0,
        logit_scale=head.logit_scale,
        softcap=head.softcap or 0.0,
        temperature=head.temperature,
        impl=impl,
        workspace_mib=workspace_mib,
        filter_eps=filtering.eps,
        tail_guard=filtering.tail_guard,
        want_stats=want_stats,
        exponentials_kernel=exponentials_kernel,
        save=exponentials_kernel and will_be_differentiated and not torch.compiler.is_compiling(),
        vocab_first=shard.first if shard else 0,
        vocab_size=shard.size if shard else 0,
        vocab_most=shard.most if shard else 0,
        vocab_group=shard.group if shard else "",
    )
    logps, values, _, stats, *_ = _token_logps_op(*arguments)
    state = SoftmaxState(values)
    if filtering.eps:
        filter_stats = FilterStats(state.tail, state.kept_fraction)
    else:
        filter_stats = nothing_filtered(target, logps.dtype)
    return logps, TokenStats(*stats.unbind(0)) if want_stats else None, filter_stats


def nothing_filtered(target: Tensor, dtype: torch.dtype) -> FilterStats:
    """Give the stats of an exact path."""
    kept = (target >= 0).to(dtype)
    return FilterStats(torch.zeros_like(kept), kept)


def _forward(*flat: Any) -> tuple[Tensor, ...]:
    """Compute what the operator returns.

    Log-probs [T], the values of the `SoftmaxState`, the screen [blocks, 2, V], the stats stacked [4, T], and both parts
    of `Exponentials`. What is not wanted, or not saved, is empty.
    """
    arguments = Arguments(*flat)
    inputs, hidden = arguments.inputs, arguments.hidden
    gradient, shifts = arguments.weight.new_empty(0), hidden.new_empty(0, dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes here are chosen, not defaults to improve on
        if arguments.filter_eps:
            logps, state, stats, screen = run_filtered_forward(
                arguments.impl,
                inputs,
                arguments.filtering,
                arguments.cu_seqlens,
                arguments.screen_shape,
                want_stats=arguments.want_stats,
            )
        else:
            exponentials = None
            if arguments.exponentials_kernel:
                from fused_dpo.gpu.exponentials import Exponentials

                exponentials = Exponentials.empty(inputs, save=arguments.save)
                if exponentials.rows:
                    gradient, shifts = exponentials
            logps, state, stats = run_exact_forward(
                arguments.impl, inputs, want_stats=arguments.want_stats, exponentials=exponentials
            )
            screen = torch.empty(0, 0, 0, dtype=torch.uint8, device=hidden.device)
    stacked = torch.stack(stats) if stats is not None else logps.new_empty(0)
    return logps, state.values, screen, stacked, gradient, shifts


def _fake_forward(*flat: Any) -> tuple[Tensor, ...]:
    """Give empty results of the right shapes; of tensors without data no exponentials are saved."""
    arguments = Arguments(*flat)
    hidden, T = arguments.hidden, arguments.target.shape[0]
    per_row = hidden.new_empty(T, dtype=accumulation_dtype(hidden.dtype))
    state = per_row.new_empty(5 if arguments.filter_eps else 3, T)
    stats = per_row.new_empty((len(TokenStats._fields), T) if arguments.want_stats else (0,))
    screen = hidden.new_empty(arguments.screen_shape, dtype=torch.uint8)
    return per_row, state, screen, stats, arguments.weight.new_empty(0), hidden.new_empty(0, dtype=torch.float32)


def _gradients(
    dlogps: Tensor,
    state: Tensor,
    screen: Tensor,
    needs: Needs,
    arguments: Arguments,
    exponentials: "Exponentials | None" = None,
) -> list[Tensor]:
    """Compute the gradients that are needed; over `exponentials`, if given, that of the weight is written."""
    inputs, of_rows = arguments.inputs, SoftmaxState(state)
    with torch.autocast(arguments.hidden.device.type, enabled=False):
        if arguments.filter_eps:
            grads = run_filtered_backward(
                arguments.impl,
                dlogps,
                inputs,
                of_rows,
                screen,
                arguments.filtering,
                arguments.cu_seqlens,
                needs=needs,
            )
        else:
            grads = run_exact_backward(arguments.impl, dlogps, inputs, of_rows, needs=needs, exponentials=exponentials)
    return [grad for grad in grads if grad is not None]


def _backward(dlogps: Tensor, state: Tensor, screen: Tensor, needs: list[bool], *flat: Any) -> list[Tensor]:
    """Compute what the operator of the backward returns: the gradients that are needed, in the order of `Needs`."""
    return _gradients(dlogps, state, screen, Needs(*needs), Arguments(*flat))


def _fake_backward(_dlogps: Tensor, _state: Tensor, _screen: Tensor, needs: list[bool], *flat: Any) -> list[Tensor]:
    """Give empty gradients of the right shapes."""
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, needed in zip(Arguments(*flat).differentiable, needs, strict=True)
        if needed and tensor is not None
    ]


_token_logps_op = torch.library.custom_op(
    "fused_dpo::token_logps",
    _forward,
    mutates_args=(),
    schema=f"({_PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_token_logps_backward_op = torch.library.custom_op(
    "fused_dpo::token_logps_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dlogps, Tensor state, Tensor screen, bool[] needs, {_PARAMETERS}) -> Tensor[]",
)
_token_logps_op.register_fake(_fake_forward)
_token_logps_backward_op.register_fake(_fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, state, screen, stats, *exponentials = output
    ctx.settings = inputs[_TENSORS:]
    ctx.save_for_backward(*inputs[:_TENSORS], state, screen)
    # Not saved by torch: what it saves must not be written over.
    ctx.saved_exponentials = exponentials if exponentials[0].numel() else None
    ctx.mark_non_differentiable(state, screen, stats, *exponentials)
    ctx.set_materialize_grads(False)  # no zeros of the size of the screen for its gradient


def _differentiate(ctx: Any, dlogps: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, state, screen = ctx.saved_tensors
    arguments = Arguments(*tensors, *ctx.settings)
    needs = Needs(*ctx.needs_input_grad[: len(Needs._fields)])
    # The gradient is written over the exponentials: another backward has to compute everything.
    saved, ctx.saved_exponentials = ctx.saved_exponentials, None
    if saved is None or not needs.weight or torch.is_grad_enabled():
        grads = iter(_token_logps_backward_op(dlogps, state, screen, list(needs), *arguments))
    else:  # no operator: one must not return what it was given
        from fused_dpo.gpu.exponentials import Exponentials

        grads = iter(_gradients(dlogps, state, screen, needs, arguments, Exponentials(*saved)))
    of_inputs = [next(grads) if needed else None for needed in needs]
    return (*of_inputs, *[None] * (len(arguments) - len(needs)))


def _refuse_double_backward(_ctx: Any, *_grads: Any) -> None:
    raise NotImplementedError(_NO_DOUBLE_BACKWARD)


_token_logps_op.register_autograd(_differentiate, setup_context=_setup_context)
_token_logps_backward_op.register_autograd(_refuse_double_backward)
