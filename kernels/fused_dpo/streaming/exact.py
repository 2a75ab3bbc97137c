"""Per-token log-probs and their exact gradients by vocabulary slices: plain torch, any device, no `[T, V]` logits.

Forward (online softmax; Milakov & Gimelshein, 2018, arXiv 1805.02867): the head is walked in slices of its rows, the
scored rows in blocks, and each tile of logits is folded into a running maximum and sum of its rows. Backward: the tiles
are recomputed, turned into `dz = dlogps * (onehot - softmax)` in place, and multiplied into both gradients.

What is summed how: logits, log-sum-exp and both gradients accumulate in fp32 (float64 for float64 inputs) and are
rounded once, on the way out. Rows that are not scored are never gathered.
"""

import torch
from torch import Tensor

from fused_dpo.head import HeadGrads, LMHead
from fused_dpo.linalg.gradient_sums import GradientSums
from fused_dpo.linalg.matmul import accumulate_product, accumulation_dtype, matmul_precision
from fused_dpo.linalg.operands import Operands
from fused_dpo.stats import TokenStats
from fused_dpo.streaming.online_softmax import OnlineSoftmax, logits_gradient
from fused_dpo.streaming.tiles import Tiles


def streaming_forward(
    hidden: Tensor, target: Tensor, rows: Tensor, head: LMHead, workspace_mib: int, *, want_stats: bool
) -> tuple[Tensor, Tensor, TokenStats | None]:
    """Log-prob and softmax state of every row; 0 where a row is not scored, NaN where its target is not below V.

    Args:
        hidden: [T, D] in the compute dtype.
        target: int64 [T].
        rows: int64 [R], the scored rows.
        head: the head; its tensors are used in the compute dtype.
        workspace_mib: see `KernelOptions`.
        want_stats: also fill a `TokenStats`.

    Returns:
        `logps` [T], the softmax's state [3, T] (the row's largest logit, the sum of exponentials above it, and 1 - p of
        the target), both in the accumulation dtype, and the stats. Two numbers instead of their log-sum-exp: beside an
        offset that all logits share, one number would lose the digits in which they differ.
    """
    operands = Operands(hidden, rows, head)
    tiles = Tiles(operands, workspace_mib)
    row_target = tiles.of_rows(target, -1)
    softmax = OnlineSoftmax(tiles.padded_rows, operands.acc_dtype, hidden.device, want_stats=want_stats)
    for cut in tiles.slices():
        for block in tiles.blocks():
            z = tiles.logits(block, cut)
            softmax.fold(z, *cut.targets(row_target[block.span]), block.span)
    stats = None
    if want_stats:
        stats = TokenStats(*map(tiles.to_rows, softmax.stats(operands.V)))
    logps = softmax.logps()
    state = torch.stack([tiles.to_rows(values) for values in (softmax.peak, softmax.total, -torch.expm1(logps))])
    return tiles.to_rows(logps), state, stats


def streaming_backward(
    dlogps: Tensor,
    hidden: Tensor,
    target: Tensor,
    rows: Tensor,
    state: Tensor,
    head: LMHead,
    workspace_mib: int,
    *,
    needs: tuple[bool, bool, bool, bool, bool],
) -> HeadGrads:
    """Exact gradients of `sum(dlogps * logps)`, only those asked for.

    `dz = dlogps * (onehot(target) - exp(z - peak) / total)`, through softcap, scale and temperature; then
    `dhidden = dz @ weight` and `dweight = dz.T @ hidden`.

    Args:
        dlogps: [T] upstream gradient, any strides.
        hidden, target, rows, head, workspace_mib: as in `streaming_forward`.
        state: [3, T] from the forward.
        needs: which of hidden, weight, bias, lora a, lora b to compute.

    Numerics: for bf16 inputs the two products take dz in bf16 (as matrix units need it; relative error 2^-9 an entry,
        of the size of the rounding of the returned gradient); for fp16, fp32 and float64 inputs in fp32 or float64.
    """
    dlogps = dlogps.to(accumulation_dtype(hidden.dtype))
    if hidden.device.type == "cpu":  # elsewhere the search would be a synchronisation
        rows = rows[dlogps[rows] != 0]
    operands = Operands(hidden, rows, head)
    tiles = Tiles(operands, workspace_mib)
    sums = GradientSums(operands, tiles.width, needs, empty=not tiles.bounds)
    row_target = tiles.of_rows(target, -1)
    peak = tiles.of_rows(state[0], torch.inf)  # padded rows: exp(z - inf) is 0 whatever their logits
    total = tiles.of_rows(state[1], 1.0)
    surprise = tiles.of_rows(state[2], 0.0)
    upstream = tiles.of_rows(dlogps, 0.0)

    for cut in tiles.slices():
        sums.begin_slice(cut.start, cut.stop)
        for block in tiles.blocks():
            span = block.span
            z = tiles.logits(block, cut)
            at_targets = cut.targets(row_target[span])
            of_rows = peak[span], total[span], surprise[span], upstream[span]
            logits = operands.logits_to_keep(z)
            dz = operands.through_logits(logits_gradient(z, *at_targets, *of_rows), logits)
            with matmul_precision(operands.dtype):
                if sums.hidden.shape[1]:
                    real = sums.hidden[span]
                    accumulate_product(real, dz[: real.shape[0]], cut.weight[:, sums.hidden_columns])
                if sums.weight.shape[1]:
                    accumulate_product(sums.weight, dz.T, block.hidden[:, sums.weight_columns])
            if sums.bias is not None:
                sums.bias.add_(dz.sum(0))
        sums.end_slice(cut.start, cut.stop)
    return sums.finish()
