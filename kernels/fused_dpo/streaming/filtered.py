"""Screen, keep, correct in plain torch on any device: what `fused_dpo.filtering` describes.

On a CPU with bf16 units and bf16 inputs the screen is coarse, unless the head has more than a weight and an adapter:
its logits are rounded to bf16, which is twice as fast. They choose the columns and weigh the tail of what is not
above `eps`, and nothing else: logits above it are computed again, accumulated in fp32. Elsewhere the screen's logits
are accumulated in fp32, and the log-probs are exact.

Under a coarse screen the theorem's first statement holds up to a factor of 1.5, which is what the rounding of the
logits can move a probability by (largest logit <= COARSE_RANGE, else the block is exact).
"""

import torch
from torch import Tensor

from fused_dpo.filtering import EVERYTHING, Filtering, Judgement, means_of_blocks
from fused_dpo.head import HeadGrads, HeadInputs, Needs
from fused_dpo.linalg.gradient_sums import GradientSums
from fused_dpo.linalg.matmul import accumulate_product, matmul_precision
from fused_dpo.linalg.operands import Operands
from fused_dpo.linalg.sizes import ceil_div, even_bounds
from fused_dpo.stats import SoftmaxState, TokenStats
from fused_dpo.streaming.dropped_means import DroppedMeans
from fused_dpo.streaming.exact import streaming_backward
from fused_dpo.streaming.kept_products import KeptProducts, targets_among
from fused_dpo.streaming.online_softmax import OnlineSoftmax, logits_gradient
from fused_dpo.streaming.screener import BLOCK_ROWS, Screener, block_spans, exponents, largest_of, rows_screened

COARSE_RANGE = 64.0
"""Largest logit that a bf16 screen is trusted with: its rounding there is at most 0.125."""


def filtered_forward(
    inputs: HeadInputs,
    filtering: Filtering,
    *,
    cu_seqlens: Tensor,
    screen_shape: tuple[int, int, int],
    want_stats: bool,
) -> tuple[Tensor, SoftmaxState, TokenStats | None, Tensor]:
    """Compute log-prob, softmax state and screen of every row; errors as in `streaming_forward`.

    Args:
        inputs: see `HeadInputs`.
        filtering: what is above `eps` in its block.
        cu_seqlens: int64 [N+1] of the sequences: a block never straddles two of them, so that a sequence's log-prob
            depends on nothing but the sequence.
        screen_shape: of the screen to return; it may have more rows than there are blocks.
        want_stats: also fill a `TokenStats`.

    Returns:
        `logps` [T], the state [5, T], the stats, and the screen [blocks, 2, V], see `fused_dpo.filtering`.
    """
    hidden, target, rows, head, workspace_mib = inputs
    operands = Operands(hidden, rows, head)
    screener = Screener(operands, workspace_mib)
    kept = KeptProducts(operands, workspace_mib) if screener.coarse else None
    block_rows = min(screener.rows, BLOCK_ROWS)
    spans = block_spans(rows, cu_seqlens, block_rows)
    R, V = rows.numel(), operands.V
    screen = torch.zeros(screen_shape, dtype=torch.uint8, device=hidden.device)
    softmax = OnlineSoftmax(R, operands.acc_dtype, hidden.device, want_stats=want_stats)
    row_target = target[rows]
    tails, fractions = torch.zeros_like(softmax.peak), torch.ones_like(softmax.peak)

    block = 0
    for group in screener.groups(spans):
        origin, end = group[0][0], group[-1][1]
        if screener.coarse:
            group_z, group_p = screener.look(origin, end)
        else:
            group_z, group_p = None, _look_closely(screener, softmax, row_target, slice(origin, end))
        for start, stop in group:
            span, local = slice(start, stop), slice(start - origin, stop - origin)
            p, targets = group_p[local], row_target[span]
            level, mean = screen[block]
            block += 1
            largest = largest_of(p)
            level.copy_(exponents(largest))
            mean.copy_(exponents(p.new_full((1, stop - start), 1 / (stop - start)) @ p).squeeze(0))
            keep = largest > filtering.eps
            keep[targets[targets < V]] = True
            keep[0] = True  # there is always one to look at
            index = keep.nonzero().squeeze(1)
            top = None
            if group_z is None:
                trusted, tail = True, p @ (~keep).to(p.dtype)
            else:
                p_top, place = p.index_select(1, index).max(1)
                z_top = group_z[local].gather(1, index[place][:, None]).squeeze(1).to(operands.acc_dtype)
                top = z_top, p_top.to(operands.acc_dtype)
                tail = p.index_fill_(1, index, 0.0).sum(1).to(operands.acc_dtype)
                # Where a row's largest is not above eps, its largest logit may be among the dropped.
                trusted = bool((z_top.abs().amax() <= COARSE_RANGE) & (p_top.amin() > filtering.eps))
            # NaN is not below the guard; gathering more than half of the columns costs more than taking all of them.
            if trusted and bool(tail.mean() <= filtering.tail_guard) and index.numel() <= V // 2:
                fractions[span] = index.numel() / V
                tails[span] = tail
            else:
                level.fill_(EVERYTHING)
                keep.fill_(True)
            if kept is None or group_z is None or top is None:  # a screen that is not coarse: all is folded
                continue
            z, (z_top, p_top) = group_z[local], top
            if want_stats:
                z, p = z[:, ~keep].to(operands.acc_dtype), p[:, ~keep].to(operands.acc_dtype)
            rows_operand = kept.hidden(start, stop)
            for columns in kept.columns(keep, 0):
                weight = kept.weight(columns)
                kept_z = kept.logits(rows_operand, weight, columns, stop - start)
                softmax.fold(kept_z, *targets_among(columns, targets), span)
            if level[0] == EVERYTHING:
                continue
            # The screen's probabilities are in units of its own softmax; its largest entry tells what those are.
            unit = (z_top - softmax.peak[span]).exp() / p_top
            softmax.add_tail(span, unit * tails[span])
            if want_stats:
                softmax.add_tail_stats(span, z, p, unit)

    T = hidden.shape[0]

    def to_rows(values: Tensor) -> Tensor:
        return values.new_zeros(T).index_copy_(0, rows, values)

    stats = TokenStats(*map(to_rows, softmax.stats(V))) if want_stats else None
    logps = softmax.logps()
    columns = softmax.peak, softmax.total, -torch.expm1(logps), tails, fractions
    return to_rows(logps), SoftmaxState(torch.stack([to_rows(values) for values in columns])), stats, screen


def _look_closely(screener: Screener, softmax: OnlineSoftmax, target: Tensor, span: slice) -> Tensor:
    """Fold the logits of the scored rows `span` into `softmax`; returns their probabilities [rows, V]."""
    tiles = screener.tiles(span.start, span.stop)
    peaks = [softmax.fold(z, *targets_among(columns, target[span]), span) for columns, z in tiles]
    return screener.probabilities(peaks, softmax.total[span])


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
    _, target, rows, head, workspace_mib = inputs
    hidden, state = _without_broken_rows(dlogps, Operands(inputs.hidden, rows, head), state)
    operands = Operands(hidden, rows, head)
    block_rows = min(rows_screened(hidden, head, workspace_mib), BLOCK_ROWS)
    spans = block_spans(rows, cu_seqlens, block_rows)
    R, V = rows.numel(), operands.V
    upstream = dlogps[rows].to(operands.acc_dtype)
    row_target, of_rows = target[rows], state.of(rows)
    peak, total, one_minus_p = of_rows.peak, of_rows.total, of_rows.one_minus_p
    sizes = torch.tensor([stop - start for start, stop in spans], dtype=torch.int64, device=hidden.device)
    block_of_row = torch.repeat_interleave(torch.arange(len(spans), device=hidden.device), sizes)
    judgement = Judgement(block_of_row, len(spans), upstream, one_minus_p, row_target, filtering.eps)
    keep = judgement.columns(screen[: len(spans), 0])
    if bool(keep.all()):  # all of it flat, as at random initialisation: nothing to choose
        return streaming_backward(dlogps, inputs._replace(hidden=hidden), state, needs=needs)
    kept = KeptProducts(operands, workspace_mib)
    log_sum_exp = means_of_blocks(peak + total.log(), block_of_row, len(spans))
    tail = DroppedMeans(operands, screen[: len(spans), 1], keep, log_sum_exp)

    bounds = even_bounds(V, max(workspace_mib * 2**19 // (operands.width * operands.acc_dtype.itemsize), kept.multiple))
    sums = GradientSums(operands, ceil_div(V, len(bounds)), needs, empty=False)
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
