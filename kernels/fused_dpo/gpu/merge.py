"""Merge the splits of each row: what the forward writes, and the kernel that sums it up."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_dpo.gpu.launch import OF_BATCH, launch
from fused_dpo.gpu.tile import exp, one_minus_p_of
from fused_dpo.linalg.sizes import ceil_div
from fused_dpo.stats import SoftmaxState, TokenStats

MERGE_ROWS = 32
"""Rows a program of the merge takes."""
MERGE_SPLITS = 64
"""Splits it takes at a time."""


@triton.jit(do_not_specialize=OF_BATCH)
def _merge_splits_kernel(
    peak_ptr,
    total_ptr,
    weighted_ptr,
    sum_ptr,
    squares_ptr,
    picked_ptr,
    row_index_ptr,
    target_ptr,
    logps_ptr,
    state_ptr,
    stats_ptr,
    tail_ptr,
    splits,
    T,
    R,
    V,
    WANT_STATS: tl.constexpr,
    SCREEN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Merge the splits of each row, BLOCK_S at a time, into the softmax's state and the log-prob.

    Grid: row blocks. Reads 2·splits numbers a row and writes 4 into the rows' places among all T; bound by latency.
    """
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < R
    peak = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        at = offs_s.to(tl.int64)[:, None] * R + offs_t[None, :]
        mask = (offs_s < splits)[:, None] & mask_t[None, :]
        peak = tl.maximum(peak, tl.max(tl.load(peak_ptr + at, mask=mask, other=float("-inf")), axis=0))
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    weighted = tl.zeros([BLOCK_T], dtype=tl.float32)
    plain = tl.zeros([BLOCK_T], dtype=tl.float32)
    squares = tl.zeros([BLOCK_T], dtype=tl.float32)
    tail = tl.zeros([BLOCK_T], dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        at = offs_s.to(tl.int64)[:, None] * R + offs_t[None, :]
        mask = (offs_s < splits)[:, None] & mask_t[None, :]
        rescale = exp(tl.load(peak_ptr + at, mask=mask, other=float("-inf")) - shift[None, :])
        total += tl.sum(tl.load(total_ptr + at, mask=mask, other=0.0) * rescale, axis=0)
        if WANT_STATS:
            weighted += tl.sum(tl.load(weighted_ptr + at, mask=mask, other=0.0) * rescale, axis=0)
            plain += tl.sum(tl.load(sum_ptr + at, mask=mask, other=0.0), axis=0)
            squares += tl.sum(tl.load(squares_ptr + at, mask=mask, other=0.0) * rescale * rescale, axis=0)
        if SCREEN:
            tail += tl.sum(tl.load(tail_ptr + at, mask=mask, other=0.0) * rescale, axis=0)
    log_total = tl.log(total)
    rows = tl.load(row_index_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
    target = tl.load(target_ptr + rows, mask=mask_t, other=0)
    picked = tl.load(picked_ptr + offs_t, mask=mask_t & (target >= 0) & (target < V), other=float("nan"))
    logp = picked - shift - log_total
    tl.store(logps_ptr + rows, logp, mask=mask_t)
    tl.store(state_ptr + rows, shift, mask=mask_t)
    tl.store(state_ptr + T + rows, total, mask=mask_t)
    tl.store(state_ptr + 2 * T + rows, one_minus_p_of(logp), mask=mask_t)
    if SCREEN:
        tl.store(state_ptr + 3 * T + rows, tail / total, mask=mask_t)
    if WANT_STATS:
        tl.store(stats_ptr + rows, log_total - (weighted / total - shift), mask=mask_t)
        tl.store(stats_ptr + T + rows, plain / V, mask=mask_t)
        tl.store(stats_ptr + 2 * T + rows, tl.where(picked >= peak, 1.0, 0.0), mask=mask_t)
        tl.store(stats_ptr + 3 * T + rows, tl.log(squares / (total * total)), mask=mask_t)


class Results(NamedTuple):
    """What a forward writes for each of the T rows; zeros where a row is not scored."""

    logps: Tensor
    """[T]"""
    state: SoftmaxState
    """[3, T], with a screen [5, T]."""
    stats: Tensor | None
    """[4, T], see `TokenStats`."""
    screen: Tensor | None
    """uint8 [blocks, 2, V], see `fused_dpo.filtering`."""

    @property
    def partials(self) -> int:
        """Numbers in fp32 that the forward leaves of each scored row and split, for the merge."""
        return 2 + 3 * (self.stats is not None) + (self.screen is not None)

    @property
    def token_stats(self) -> TokenStats | None:
        """The stats by their names, if there are any."""
        return None if self.stats is None else TokenStats(*self.stats.unbind(0))


def empty_results(hidden: Tensor, *, want_stats: bool, screen_shape: tuple[int, int, int] | None = None) -> Results:
    """Allocate zeros to write into."""
    T = hidden.shape[0]
    logps = torch.zeros(T, dtype=torch.float32, device=hidden.device)
    return Results(
        logps,
        SoftmaxState(logps.new_zeros(3 if screen_shape is None else 5, T)),
        logps.new_zeros(len(TokenStats._fields), T) if want_stats else None,
        None if screen_shape is None else logps.new_zeros(screen_shape, dtype=torch.uint8),
    )


def merge_splits(results: Results, R: int, V: int, splits: int, partials: dict[str, Any]) -> None:
    """Merge what the forward has written for each split and row.

    Args:
        results: to fill.
        R: scored rows.
        V: columns of the vocabulary.
        splits: how many there are of each row.
        partials: arguments of the kernel by name, those that the forward shares with it.
    """
    logps, state, stats, screen = results
    arguments: dict[str, Any] = {"splits": splits, "T": logps.shape[0], "V": V}
    arguments |= {"logps_ptr": logps, "state_ptr": state.values, "stats_ptr": logps if stats is None else stats}
    arguments |= {"SCREEN": screen is not None, "BLOCK_T": MERGE_ROWS, "BLOCK_S": MERGE_SPLITS}
    launch(_merge_splits_kernel, (ceil_div(R, MERGE_ROWS),), logps, **partials, **arguments)
