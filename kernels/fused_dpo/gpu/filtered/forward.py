"""The filtered forward on CUDA: the exact one, which notes a screen from its tiles."""

import math

import torch
from torch import Tensor

from fused_dpo.filtering import BIAS, EVERYTHING
from fused_dpo.gpu.filtered.blocks import backward_config, block_sizes, of_blocks
from fused_dpo.gpu.forward import Scan, fused_scan
from fused_dpo.gpu.merge import empty_results
from fused_dpo.head import LMHead
from fused_dpo.linalg.sizes import ceil_div
from fused_dpo.stats import TokenStats


def triton_filtered_forward(
    hidden: Tensor,
    target: Tensor,
    rows: Tensor,
    head: LMHead,
    workspace_mib: int,
    *,
    cu_seqlens: Tensor,
    filter_eps: float,
    tail_guard: float,
    screen_shape: tuple[int, int, int],
    want_stats: bool,
    scan: Scan = fused_scan,
) -> tuple[Tensor, Tensor, TokenStats | None, Tensor]:
    """Log-prob, softmax state and screen: `filtered_forward` on CUDA, its log-probs and stats those of the exact path.

    Memory: as `triton_forward`, 4 bytes more a scored row and split, and the screen, 2·V bytes a block of rows.
    """
    del cu_seqlens  # the screen is exact here, so what a row's block holds beside it has no part in its log-prob
    results = empty_results(hidden, want_stats=want_stats, screen_shape=screen_shape)
    logps, state, _, screen = results
    assert screen is not None
    if rows.numel():
        scan(hidden, target, rows, head, results, filter_eps, workspace_mib)
        R, V, config, device = rows.numel(), head.weight.shape[0], backward_config(hidden, head), hidden.device
        blocks = ceil_div(R, config.block_t)
        columns = (screen[:blocks, 0] >= math.floor(BIAS + math.log2(filter_eps))).sum(1, dtype=torch.float32)
        mean_tail = of_blocks(state[3, rows], blocks, config.block_t).sum(1) / block_sizes(R, blocks, config, device)
        flat = ~(mean_tail <= tail_guard) | (columns > V // 2)  # NaN is not below the guard
        screen[:blocks, 0].masked_fill_(flat[:, None], EVERYTHING)
        flat_rows = flat.repeat_interleave(config.block_t)[:R]
        fraction = torch.where(flat, 1.0, columns / V).repeat_interleave(config.block_t)[:R]
        state[3].index_copy_(0, rows, state[3, rows].masked_fill(flat_rows, 0.0))
        state[4].index_copy_(0, rows, fraction)
    return logps, state, results.token_stats, screen
