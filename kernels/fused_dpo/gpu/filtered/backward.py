"""Screen, keep, correct on CUDA: the algorithm and error budget of `fused_dpo.filtering`, without a synchronisation.

The forward is the exact one, and notes from its tiles how large a probability each column reaches in a block of rows.
It runs the first split of the vocabulary, where byte-pair tokenizers have their most frequent tokens, once before: its
log-sum-exp bounds the whole one from below well enough to know a probability from above.

Once the upstream gradients are known, the backward lists the columns that each block of rows keeps, computes dz there,
and marks the rows that have something above the threshold in each narrow block of columns. dz is computed again for
those, so that either gradient is a product with gathered rows, in a fixed order, with one writer for each entry. What
lies in a kept column but in a row that is not marked, below the threshold, is left out of the weight's gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_dpo.filtering import EVERYTHING, Filtering, Judgement
from fused_dpo.gpu.filtered.blocks import block_sizes, of_blocks
from fused_dpo.gpu.filtered.dropped_means import TAIL_SCALE, DroppedMeans, dropped_means
from fused_dpo.gpu.filtered.lists import KeptLists
from fused_dpo.gpu.launch import weight_slices
from fused_dpo.head import HeadGrads, HeadInputs, Needs
from fused_dpo.linalg.gradient_sums import GradientSums
from fused_dpo.linalg.matmul import in_range
from fused_dpo.linalg.operands import Operands
from fused_dpo.linalg.sizes import ceil_div
from fused_dpo.stats import SoftmaxState
from fused_dpo.vocab_parallel.collectives import sum_over_ranks


def triton_filtered_backward(
    dlogps: Tensor,
    inputs: HeadInputs,
    state: SoftmaxState,
    screen: Tensor,
    filtering: Filtering,
    *,
    needs: Needs,
) -> HeadGrads:
    """Compute the gradients of `sum(dlogps * logps)`, only those asked for: `filtered_backward` on CUDA.

    Numerics: dz is held in the hidden states' dtype (fp16: scaled so that its largest upstream gradient is 1); both
        products accumulate in fp32. No atomics.
    Memory: `workspace_mib`, 4·D bytes a scored row for the hidden states' gradient, 5·V bytes a block of rows for its
        kept columns, V/64 bytes a row, and a copy of 1024 hidden states. No synchronisation with the host.
    """
    rows = inputs.rows
    operands = Operands(inputs.hidden, rows, inputs.head, inputs.shard)
    sums = GradientSums(operands, 0, needs, empty=not rows.numel())
    if rows.numel():
        _add_kept(sums, dlogps[rows].float(), inputs, state, screen, filtering.eps)
    return sums.finish()


def _add_kept(
    sums: GradientSums,
    upstream: Tensor,
    inputs: HeadInputs,
    state: SoftmaxState,
    screen: Tensor,
    eps: float,
) -> None:
    """Add what is kept, and what stands for the rest, to the hidden states' sums; write the other gradients."""
    operands, device = sums.operands, upstream.device
    rows, R, V = operands.rows, operands.rows.numel(), operands.V
    upstream, unit = in_range(upstream, operands.dtype)
    kept = KeptLists(operands, inputs.target, state, upstream, inputs.workspace_mib)
    blocks, config = kept.blocks, kept.config
    block_of_row = torch.arange(R, device=device) // config.block_t
    judgement = Judgement(block_of_row, blocks, upstream, state.one_minus_p[rows], inputs.target[rows], eps)
    flat = (screen[:blocks, 0, 0] == EVERYTHING)[block_of_row] & (judgement.magnitude > judgement.negligible)
    marks = F.pad(flat, (0, kept.slots - R)).expand(ceil_div(V, config.narrow), -1).contiguous()
    keep, _ = judgement.columns(screen[:blocks, 0], inputs.shard)
    residual = kept.add_hidden_gradient(keep, judgement.smallest[block_of_row], marks, sums)
    offset = of_blocks((state.peak[rows] + state.total[rows].log()), blocks, config.block_t).sum(1)
    means = dropped_means(operands, screen[:blocks, 1], keep, offset / block_sizes(R, blocks, config, device))
    if sums.dhidden_sum.shape[1]:
        sum_over_ranks(residual, inputs.shard)
        _subtract_spread(
            sums.dhidden_sum, residual, _spread_of_blocks(sums, means, inputs.workspace_mib), config.block_t
        )
        if unit is not None:
            sums.dhidden_sum *= unit
    if sums.dweight is not None or sums.dbias is not None or sums.dlora_b is not None:
        judged = torch.where(judgement.magnitude > judgement.negligible, upstream, 0.0)
        unit = upstream.new_ones(()) if unit is None else unit
        kept.write_weight_gradients(marks, keep, sums, means.values, of_blocks(judged, blocks, config.block_t), unit)


def _spread_of_blocks(sums: GradientSums, means: DroppedMeans, workspace_mib: int) -> Tensor:
    """Compute `q @ [weight | b]` of every block, the columns of it that the sums have.

    q is what the block drops, its probabilities divided by their sum.
    """
    head, dtype = sums.operands.head, means.values.dtype
    spread = means.mass.new_zeros(len(means.mass), sums.dhidden_sum.shape[1])
    # In one piece, unless the weight has to be converted.
    fits = max(workspace_mib * 2**18 // (sums.operands.D * dtype.itemsize), 1)
    for weight in weight_slices(head.weight, dtype, sums.operands.V if head.weight.dtype == dtype else fits):
        start, stop = weight.first, weight.first + weight.values.shape[0]
        sums.add_hidden(spread, means.values[:, start:stop], weight.values, start, stop)
    factor = head.logit_scale / head.temperature / TAIL_SCALE
    return spread * (factor / torch.where(means.mass > 0, means.mass, 1.0))[:, None]


def _subtract_spread(sums: Tensor, residual: Tensor, spread: Tensor, block_t: int) -> None:
    """Take `residual * spread` of each row's block from `sums` [R, columns], without a copy of their size."""
    R, full = residual.numel(), residual.numel() // block_t
    of_blocks = sums[: full * block_t].view(full, block_t, sums.shape[1])
    of_blocks.addcmul_(residual[: full * block_t].view(full, block_t, 1), spread[:full, None], value=-1.0)
    if full * block_t < R:
        sums[full * block_t :].addr_(residual[full * block_t :], spread[full], alpha=-1.0)
