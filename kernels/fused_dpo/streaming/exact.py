"""Per-token log-probs and their exact gradients by vocabulary slices: plain torch, any device, no `[T, V]` logits.

Forward (online softmax; Milakov & Gimelshein, 2018, arXiv 1805.02867): the head is walked in slices of its rows, the
scored rows in blocks, and each tile of logits is folded into a running maximum and sum of its rows. Backward: the tiles
are recomputed, turned into `dz = dlogps * (onehot - softmax)` in place, and multiplied into both gradients.

What is summed how: logits, log-sum-exp and both gradients accumulate in fp32 (float64 for float64 inputs) and are
rounded once, on the way out. Rows that are not scored are never gathered.
"""

import torch
from torch import Tensor

from fused_dpo.head import HeadGrads, HeadInputs, Needs
from fused_dpo.linalg.gradient_sums import GradientSums
from fused_dpo.linalg.matmul import accumulate_product, accumulation_dtype, matmul_precision
from fused_dpo.linalg.operands import Operands
from fused_dpo.stats import SoftmaxState, TokenStats
from fused_dpo.streaming.online_softmax import OnlineSoftmax, logits_gradient
from fused_dpo.streaming.tiles import Tiles


def streaming_forward(inputs: HeadInputs, *, want_stats: bool) -> tuple[Tensor, SoftmaxState, TokenStats | None]:
    """Compute log-prob and softmax state of every row; 0 where it is not scored, NaN where its target is not below V.

    Args:
        inputs: see `HeadInputs`.
        want_stats: also fill a `TokenStats`.

    Returns:
        `logps` [T] and the state [3, T], both in the accumulation dtype, and the stats.
    """
    hidden, target, rows, head, workspace_mib, shard = inputs
    operands = Operands(hidden, rows, head, shard)
    tiles = Tiles(operands, workspace_mib)
    row_target = tiles.of_rows(target, -1)
    count, padded = max(len(tiles.bounds), 1), tiles.padded_rows
    online = OnlineSoftmax(count, padded, operands.acc_dtype, hidden.device, want_stats=want_stats)
    for number, cut in enumerate(tiles.slices()):
        for block in tiles.blocks():
            z = tiles.logits(block, cut)
            online.fold(number, z, *cut.targets(row_target[block.span]), block.span)
    softmax = online.merge(count, slice(padded), shard)
    stats = None
    if want_stats:
        stats = TokenStats(*map(tiles.to_rows, softmax.stats(operands.vocabulary)))
    logps = softmax.logps()
    state = torch.stack([tiles.to_rows(values) for values in (softmax.peak, softmax.total, -torch.expm1(logps))])
    return tiles.to_rows(logps), SoftmaxState(state), stats


def streaming_backward(dlogps: Tensor, inputs: HeadInputs, state: SoftmaxState, *, needs: Needs) -> HeadGrads:
    """Compute the exact gradients of `sum(dlogps * logps)`, only those asked for.

    `dz = dlogps * (onehot(target) - exp(z - peak) / total)`, through softcap, scale and temperature; then
    `dhidden = dz @ weight` and `dweight = dz.T @ hidden`.

    Args:
        dlogps: [T] upstream gradient, any strides.
        inputs: those of the forward.
        state: [3, T] from the forward.
        needs: which gradients to compute.

    Numerics: for bf16 inputs the two products take dz in bf16 (as matrix units need it; relative error 2^-9 an entry,
        of the size of the rounding of the returned gradient); for fp16, fp32 and float64 inputs in fp32 or float64.
    """
    hidden, target, rows, head, workspace_mib, shard = inputs
    dlogps = dlogps.to(accumulation_dtype(hidden.dtype))
    if hidden.device.type == "cpu":  # elsewhere the search would be a synchronisation
        rows = rows[dlogps[rows] != 0]
    operands = Operands(hidden, rows, head, shard)
    tiles = Tiles(operands, workspace_mib)
    sums = GradientSums(operands, tiles.width, needs, empty=not tiles.bounds)
    row_target = tiles.of_rows(target, -1)
    peak = tiles.of_rows(state.peak, torch.inf)  # padded rows: exp(z - inf) is 0 whatever their logits
    total = tiles.of_rows(state.total, 1.0)
    one_minus_p = tiles.of_rows(state.one_minus_p, 0.0)
    upstream = tiles.of_rows(dlogps, 0.0)

    for cut in tiles.slices():
        sums.begin_slice(cut.start, cut.stop)
        for block in tiles.blocks():
            span = block.span
            z = tiles.logits(block, cut)
            at_targets = cut.targets(row_target[span])
            of_rows = peak[span], total[span], one_minus_p[span], upstream[span]
            logits = operands.logits_to_keep(z)
            dz = operands.through_logits(logits_gradient(z, *at_targets, *of_rows), logits)
            with matmul_precision(operands.dtype):
                if sums.dhidden_sum.shape[1]:
                    real = sums.dhidden_sum[span]
                    accumulate_product(real, dz[: real.shape[0]], cut.weight[:, sums.hidden_columns])
                if sums.dweight_sum.shape[1]:
                    accumulate_product(sums.dweight_sum, dz.T, block.hidden[:, sums.weight_columns])
            if sums.dbias_sum is not None:
                sums.dbias_sum.add_(dz.sum(0))
        sums.end_slice(cut.start, cut.stop)
    return sums.finish()
