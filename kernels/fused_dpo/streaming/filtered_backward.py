"""Keep and correct in plain torch on any device: the second part of what `fused_dpo.filtering` describes."""

import torch
from torch import Tensor

from fused_dpo.filtering import Filtering, Judgement, means_of_blocks
from fused_dpo.head import HeadGrads, HeadInputs, Needs
from fused_dpo.linalg.gradient_sums import GradientSums
from fused_dpo.linalg.matmul import accumulate_product, matmul_precision
from fused_dpo.linalg.operands import Operands
from fused_dpo.linalg.sizes import even_bounds
from fused_dpo.stats import SoftmaxState
from fused_dpo.streaming.dropped_means import DroppedMeans
from fused_dpo.streaming.exact import streaming_backward
from fused_dpo.streaming.kept_products import KeptProducts, targets_among
from fused_dpo.streaming.online_softmax import logits_gradient
from fused_dpo.streaming.screener import BLOCK_ROWS, block_spans, rows_screened
from fused_dpo.vocab_parallel.collectives import sum_over_ranks


def filtered_backward(
    dlogps: Tensor,
    inputs: HeadInputs,
    state: SoftmaxState,
    screen: Tensor,
    filtering: Filtering,
    *,
    cu_seqlens: Tensor,
    needs: Needs,
) -> HeadGrads:
    """Compute the gradients of `sum(dlogps * logps)`, only those asked for, as `fused_dpo.filtering` bounds them.

    Args:
        dlogps, needs: as in `streaming_backward`.
        inputs, filtering, cu_seqlens: those of the forward.
        state, screen: from the forward.

    Numerics: as in `streaming_backward`, on the kept columns. A batch that is flat throughout is left to it.
    """
    _, target, rows, head, workspace_mib, shard = inputs
    hidden, state = _without_broken_rows(dlogps, Operands(inputs.hidden, rows, head), state)
    operands = Operands(hidden, rows, head, shard)
    block_rows = min(rows_screened(hidden, head, workspace_mib, shard), BLOCK_ROWS)
    spans = block_spans(rows, cu_seqlens, block_rows)
    R = rows.numel()
    upstream = dlogps[rows].to(operands.acc_dtype)
    row_target, of_rows = target[rows], state.of(rows)
    peak, total, one_minus_p = of_rows.peak, of_rows.total, of_rows.one_minus_p
    sizes = torch.tensor([stop - start for start, stop in spans], dtype=torch.int64, device=hidden.device)
    block_of_row = torch.repeat_interleave(torch.arange(len(spans), device=hidden.device), sizes)
    judgement = Judgement(block_of_row, len(spans), upstream, one_minus_p, row_target, filtering.eps)
    keep, everything = judgement.columns(screen[: len(spans), 0], shard)
    if bool(everything.all()):  # all of it flat, as at random initialisation: nothing to choose
        return streaming_backward(dlogps, inputs._replace(hidden=hidden), state, needs=needs)
    kept = KeptProducts(operands, workspace_mib)
    log_sum_exp = means_of_blocks(peak + total.log(), block_of_row, len(spans))
    tail = DroppedMeans(operands, screen[: len(spans), 1], keep, log_sum_exp)

    fits = workspace_mib * 2**19 // (operands.width * operands.acc_dtype.itemsize)
    bounds = operands.slice_bounds(max(fits, kept.multiple))
    sums = GradientSums(operands, max(stop - start for start, stop in bounds), needs, empty=False)
    fits = workspace_mib * 2**18 // (6 * max(len(spans), 1) * operands.acc_dtype.itemsize)
    tail_width = min(max(fits, kept.multiple), kept.width)
    upstream_sums = None
    if sums.dweight_sum.shape[1] or sums.dbias_sum is not None:
        judged = upstream.masked_fill(judgement.negligible >= judgement.magnitude, 0.0)
        upstream_sums = _upstream_sums(kept, judged, spans)
    residual = torch.zeros_like(upstream)  # sum of each row of dz over the columns it keeps
    for first, last in bounds:
        sums.begin_slice(first, last)
        for block, (start, stop) in enumerate(spans):
            span = slice(start, stop)
            rows_operand = None
            for columns in kept.columns(keep[block, first:last], first):
                if rows_operand is None:
                    rows_operand = kept.hidden(start, stop)
                weight = kept.weight(columns)
                z = kept.logits(rows_operand, weight, columns, stop - start)
                logits = operands.logits_to_keep(z)
                at_targets = targets_among(columns, row_target[span])
                softmax = peak[span], total[span], one_minus_p[span]
                dz = logits_gradient(z, *at_targets, *softmax, upstream[span])
                residual[span] += dz.sum(1)
                operands.through_logits(dz, logits)
                _add_products(sums, kept, dz, weight, rows_operand, columns, span, first)
        if upstream_sums is not None:
            _correct_weight(sums, tail, upstream_sums, first, last, tail_width)
        sums.end_slice(first, last)
    if sums.dhidden_sum.shape[1] and R:
        spread = tail.spread(tail_width, kept.weight_buffer)[:, sums.hidden_columns]
        sum_over_ranks(residual, shard)
        for block, (start, stop) in enumerate(spans):
            sums.dhidden_sum[start:stop].addr_(residual[start:stop], spread[block], alpha=-1.0)
    return sums.finish()


def _without_broken_rows(dlogps: Tensor, operands: Operands, state: SoftmaxState) -> tuple[Tensor, SoftmaxState]:
    """Return hidden states and state with a hidden row of zeros for each row without gradient that is not finite.

    Zero times what is not finite would be NaN in all sums that the row takes part in.
    """
    hidden, rows = operands.hidden, operands.rows
    broken = rows[(dlogps[rows] == 0) & ~state.of(rows).values.isfinite().all(0)]
    if not broken.numel():
        return hidden, state
    logits = operands.to_logits(state.values.new_zeros(operands.V), operands.bias(slice(None)))
    mended = SoftmaxState(state.values.index_fill(1, broken, 0.0))
    mended.peak[broken] = peak = logits.amax()
    mended.total[broken] = (logits - peak).exp().sum()
    return hidden.index_fill(0, broken, 0.0), mended


def _upstream_sums(kept: KeptProducts, upstream: Tensor, spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Sum upstream times hidden state over each block's rows, as operand [blocks, K], and upstream alone [blocks]."""
    operands = kept.operands
    sums = torch.zeros(len(spans), operands.width, dtype=operands.acc_dtype, device=upstream.device)
    counts = upstream.new_zeros(len(spans))
    for block, (start, stop) in enumerate(spans):
        part = upstream[start:stop]
        hidden = kept.hidden(start, stop)[: stop - start].to(operands.acc_dtype)
        sums[block] = part @ hidden.masked_fill((part == 0)[:, None], 0.0)  # what has no gradient may be NaN
        counts[block] = part.sum()
    return sums.to(operands.held_dtype), counts


def _correct_weight(
    sums: GradientSums, tail: DroppedMeans, upstream_sums: tuple[Tensor, Tensor], first: int, last: int, width: int
) -> None:
    """Take the dropped columns' mean probabilities for each row's own in the sums of the slice `first:last`."""
    hidden, counts = upstream_sums
    operands = sums.operands
    for start, stop in even_bounds(last - first, width):
        _, dz = tail.columns(first + start, first + stop)
        with matmul_precision(operands.dtype):
            accumulate_product(sums.dweight_sum[start:stop], dz.neg().T, hidden[:, sums.weight_columns])
        if sums.dbias_sum is not None:
            sums.dbias_sum[start:stop] -= counts @ dz


def _add_products(
    sums: GradientSums,
    kept: KeptProducts,
    dz: Tensor,
    weight: Tensor,
    hidden: Tensor,
    columns: slice | Tensor,
    span: slice,
    first: int,
) -> None:
    """Add the share of one chunk of kept columns to both sums. `weight` and `hidden` are padded, `dz` is not."""
    rows, count = dz.shape
    padded = kept.pad(dz, hidden, weight)
    if sums.dhidden_sum.shape[1]:
        sums.dhidden_sum[span] += kept.product(padded, weight[:, sums.hidden_columns])[:rows]
    if sums.dweight_sum.shape[1]:
        share = kept.product(padded.T, hidden[:, sums.weight_columns])[:count]
        if isinstance(columns, slice):
            sums.dweight_sum[columns.start - first : columns.stop - first] += share
        else:
            sums.dweight_sum.index_add_(0, columns - first, share)
    if sums.dbias_sum is not None:
        share = dz.sum(0)
        if isinstance(columns, slice):
            sums.dbias_sum[columns.start - first : columns.stop - first] += share
        else:
            sums.dbias_sum.index_add_(0, columns - first, share)
