"""The filtered forward on CUDA: the exact one, which notes a screen from its tiles."""

import math

import torch
from torch import Tensor

from fused_dpo.filtering import BIAS, EVERYTHING, Filtering, vocabulary_size
from fused_dpo.gpu.filtered.blocks import backward_config, block_sizes, of_blocks
from fused_dpo.gpu.forward import Scan
from fused_dpo.gpu.merge import empty_results
from fused_dpo.head import HeadInputs
from fused_dpo.linalg.sizes import ceil_div
from fused_dpo.stats import SoftmaxState, TokenStats
from fused_dpo.vocab_parallel.collectives import sum_over_ranks


def triton_filtered_forward(
    inputs: HeadInputs,
    filtering: Filtering,
    scan: Scan,
    *,
    screen_shape: tuple[int, int, int],
    want_stats: bool,
) -> tuple[Tensor, SoftmaxState, TokenStats | None, Tensor]:
    """Compute log-prob, softmax state and screen: `filtered_forward` on CUDA, its log-probs those of the exact path.

    The screen is exact here, so what a row's block holds beside it has no part in its log-prob, and blocks may straddle
    two sequences.

    Memory: as `triton_forward`, 4 bytes more a scored row and split, and the screen, 2·V bytes a block of rows.
    """
    hidden, rows, head, shard = inputs.hidden, inputs.rows, inputs.head, inputs.shard
    results = empty_results(hidden, want_stats=want_stats, screen_shape=screen_shape)
    logps, state, _, screen = results
    assert screen is not None
    if rows.numel():
        scan(inputs, results, filtering.eps)
        R, V, device = rows.numel(), vocabulary_size(screen, shard), hidden.device
        config = backward_config(hidden, head)
        blocks = ceil_div(R, config.block_t)
        columns = (screen[:blocks, 0] >= math.floor(BIAS + math.log2(filtering.eps))).sum(1, dtype=torch.float32)
        sum_over_ranks(columns, shard)
        mean_tail = of_blocks(state.tail[rows], blocks, config.block_t).sum(1) / block_sizes(R, blocks, config, device)
        flat = ~(mean_tail <= filtering.tail_guard) | (columns > V // 2)  # NaN is not below the guard
        screen[:blocks, 0].masked_fill_(flat[:, None], EVERYTHING)
        flat_rows = flat.repeat_interleave(config.block_t)[:R]
        fraction = torch.where(flat, 1.0, columns / V).repeat_interleave(config.block_t)[:R]
        state.tail.index_copy_(0, rows, state.tail[rows].masked_fill(flat_rows, 0.0))
        state.kept_fraction.index_copy_(0, rows, fraction)
    return logps, state, results.token_stats, screen
