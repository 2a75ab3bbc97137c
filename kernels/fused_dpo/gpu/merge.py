"""Merge the splits of each row: what the forward writes, and the kernel that sums it up."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_dpo.gpu.launch import OF_BATCH, launch, named
from fused_dpo.gpu.tile import UNIT, exp, one_minus_p_of
from fused_dpo.head import VocabShard
from fused_dpo.linalg.sizes import ceil_div
from fused_dpo.stats import SoftmaxState, TokenStats
from fused_dpo.vocab_parallel.collectives import max_over_ranks, sum_over_ranks
from fused_dpo.vocab_parallel.rows import sums_of_ranks

MERGE_ROWS = 32
"""Rows a program of the merge takes."""
MERGE_SPLITS = 64
"""Splits it takes at a time."""


@triton.jit
def _units(values, mask):
    """Turn numbers of at least 0 into multiples of 2^-40; 0 where they are not finite, or masked."""
    return (tl.where(mask & (values < 1e30), values, 0.0) * UNIT).to(tl.int64)


@triton.jit
def _finish(
    logps_ptr, state_ptr, stats_ptr, rows, T, V, mask_t, peak, units, broken, tail_units, picked, weighted, plain,
    squares, WANT_STATS: tl.constexpr, SCREEN: tl.constexpr
):  # fmt: skip
    """Write what is known of a row into its place among all T."""
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.where(broken > 0, float("nan"), units.to(tl.float32) * (1.0 / UNIT))
    log_total = tl.log(total)
    logp = picked - shift - log_total
    tl.store(logps_ptr + rows, logp, mask=mask_t)
    tl.store(state_ptr + rows, shift, mask=mask_t)
    tl.store(state_ptr + T + rows, total, mask=mask_t)
    tl.store(state_ptr + 2 * T + rows, one_minus_p_of(logp), mask=mask_t)
    if SCREEN:
        tl.store(state_ptr + 3 * T + rows, tail_units.to(tl.float32) * (1.0 / UNIT) / total, mask=mask_t)
    if WANT_STATS:
        tl.store(stats_ptr + rows, log_total - (weighted / total - shift), mask=mask_t)
        tl.store(stats_ptr + T + rows, plain / V, mask=mask_t)
        tl.store(stats_ptr + 2 * T + rows, tl.where(picked >= peak, 1.0, 0.0), mask=mask_t)
        tl.store(stats_ptr + 3 * T + rows, tl.log(squares / (total * total)), mask=mask_t)


@triton.jit(do_not_specialize=OF_BATCH, repr=named("_merge_splits_kernel", SHARED=("shared", "")))
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
    shared_peak_ptr,
    shared_units_ptr,
    shared_sums_ptr,
    splits,
    T,
    R,
    V,
    WANT_STATS: tl.constexpr,
    SCREEN: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Merge the splits of each row, BLOCK_S at a time, into the softmax's state and the log-prob.

    In integers, so that the order of the splits is nothing to the bits. SHARED: the vocabulary is split over ranks, and
    `shared_peak` [R] is the largest logit on all of them. Written are the sums above it: `shared_units` int64 [3, R],
    the multiples of total and tail, and whether a number was not finite, and `shared_sums` [3, R] for the stats; and
    NaN for the target's logit where it is not here.

    Grid: row blocks. Reads 2·splits numbers a row and writes 4 into the rows' places among all T; bound by latency.
    """
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < R
    peak = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    if SHARED:
        peak = tl.load(shared_peak_ptr + offs_t, mask=mask_t, other=float("-inf"))
    else:
        for start in range(0, splits, BLOCK_S):
            offs_s = start + tl.arange(0, BLOCK_S)
            at = offs_s.to(tl.int64)[:, None] * R + offs_t[None, :]
            mask = (offs_s < splits)[:, None] & mask_t[None, :]
            peak = tl.maximum(peak, tl.max(tl.load(peak_ptr + at, mask=mask, other=float("-inf")), axis=0))
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    units = tl.zeros([BLOCK_T], dtype=tl.int64)
    tail_units = tl.zeros([BLOCK_T], dtype=tl.int64)
    broken = tl.zeros([BLOCK_T], dtype=tl.int32)
    weighted = tl.zeros([BLOCK_T], dtype=tl.float32)
    plain = tl.zeros([BLOCK_T], dtype=tl.float32)
    squares = tl.zeros([BLOCK_T], dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        at = offs_s.to(tl.int64)[:, None] * R + offs_t[None, :]
        mask = (offs_s < splits)[:, None] & mask_t[None, :]
        rescale = exp(tl.load(peak_ptr + at, mask=mask, other=float("-inf")) - shift[None, :])
        total = tl.load(total_ptr + at, mask=mask, other=0.0) * rescale
        units += tl.sum(_units(total, mask), axis=0)
        broken = tl.maximum(broken, tl.max((mask & ~(total < 1e30)).to(tl.int32), axis=0))
        if WANT_STATS:
            weighted += tl.sum(tl.load(weighted_ptr + at, mask=mask, other=0.0) * rescale, axis=0)
            plain += tl.sum(tl.load(sum_ptr + at, mask=mask, other=0.0), axis=0)
            squares += tl.sum(tl.load(squares_ptr + at, mask=mask, other=0.0) * rescale * rescale, axis=0)
        if SCREEN:
            tail_units += tl.sum(_units(tl.load(tail_ptr + at, mask=mask, other=0.0) * rescale, mask), axis=0)
    rows = tl.load(row_index_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
    target = tl.load(target_ptr + rows, mask=mask_t, other=0)
    picked = tl.load(picked_ptr + offs_t, mask=mask_t & (target >= 0) & (target < V), other=float("nan"))
    if SHARED:
        tl.store(picked_ptr + offs_t, picked, mask=mask_t)
        tl.store(shared_units_ptr + offs_t, units, mask=mask_t)
        tl.store(shared_units_ptr + R + offs_t, broken.to(tl.int64), mask=mask_t)
        if SCREEN:
            tl.store(shared_units_ptr + 2 * R + offs_t, tail_units, mask=mask_t)
        if WANT_STATS:
            tl.store(shared_sums_ptr + offs_t, weighted, mask=mask_t)
            tl.store(shared_sums_ptr + R + offs_t, plain, mask=mask_t)
            tl.store(shared_sums_ptr + 2 * R + offs_t, squares, mask=mask_t)
    else:
        _finish(
            logps_ptr, state_ptr, stats_ptr, rows, T, V, mask_t, peak, units, broken, tail_units, picked, weighted,
            plain, squares, WANT_STATS, SCREEN
        )  # fmt: skip


@triton.jit(do_not_specialize=OF_BATCH)
def _finish_rows_kernel(
    shared_peak_ptr,
    shared_units_ptr,
    shared_sums_ptr,
    picked_ptr,
    row_index_ptr,
    logps_ptr,
    state_ptr,
    stats_ptr,
    T,
    R,
    V,
    WANT_STATS: tl.constexpr,
    SCREEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Finish what SHARED merges of all ranks have summed up; V is that of all ranks. Grid: row blocks."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < R
    rows = tl.load(row_index_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
    peak = tl.load(shared_peak_ptr + offs_t, mask=mask_t, other=0.0)
    picked = tl.load(picked_ptr + offs_t, mask=mask_t, other=0.0)
    units = tl.load(shared_units_ptr + offs_t, mask=mask_t, other=0)
    broken = tl.load(shared_units_ptr + R + offs_t, mask=mask_t, other=0)
    tail_units = units
    weighted, plain, squares = peak, peak, peak
    if SCREEN:
        tail_units = tl.load(shared_units_ptr + 2 * R + offs_t, mask=mask_t, other=0)
    if WANT_STATS:
        weighted = tl.load(shared_sums_ptr + offs_t, mask=mask_t, other=0.0)
        plain = tl.load(shared_sums_ptr + R + offs_t, mask=mask_t, other=0.0)
        squares = tl.load(shared_sums_ptr + 2 * R + offs_t, mask=mask_t, other=1.0)
    _finish(
        logps_ptr, state_ptr, stats_ptr, rows, T, V, mask_t, peak, units, broken, tail_units, picked, weighted, plain,
        squares, WANT_STATS, SCREEN
    )  # fmt: skip


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


def merge_splits(
    results: Results, R: int, V: int, splits: int, partials: dict[str, Any], shard: VocabShard | None = None
) -> None:
    """Merge what the forward has written for each split and row, and what it has on all ranks.

    Args:
        results: to fill.
        R: scored rows.
        V: columns of the vocabulary that are here.
        splits: how many there are of each row.
        partials: arguments of the kernel by name, those that the forward shares with it.
        shard: which part of the vocabulary is here; None for all of it.
    """
    logps, state, stats, screen = results
    arguments: dict[str, Any] = {"T": logps.shape[0], "SCREEN": screen is not None, "BLOCK_T": MERGE_ROWS}
    arguments |= {"logps_ptr": logps, "state_ptr": state.values, "stats_ptr": logps if stats is None else stats}
    grid = (ceil_div(R, MERGE_ROWS),)
    merge = partials | arguments | {"splits": splits, "V": V, "BLOCK_S": MERGE_SPLITS, "SHARED": shard is not None}
    if shard is None:
        stand_ins = {"shared_peak_ptr": logps, "shared_units_ptr": logps, "shared_sums_ptr": logps}
        launch(_merge_splits_kernel, grid, logps, **merge, **stand_ins)
        return
    peak = max_over_ranks(partials["peak_ptr"].amax(0), shard)
    units = torch.empty(2 + (screen is not None), R, dtype=torch.int64, device=logps.device)
    sums = peak.new_empty(0 if stats is None else 3, R)
    launch(
        _merge_splits_kernel, grid, logps, **merge, shared_peak_ptr=peak, shared_units_ptr=units, shared_sums_ptr=sums
    )
    units, picked = sums_of_ranks(units, partials["picked_ptr"], shard)
    sum_over_ranks(sums, shard)
    arguments |= {"row_index_ptr": partials["row_index_ptr"], "WANT_STATS": stats is not None, "R": R, "V": shard.size}
    arguments |= {"shared_peak_ptr": peak, "shared_units_ptr": units, "shared_sums_ptr": sums, "picked_ptr": picked}
    launch(_finish_rows_kernel, grid, logps, **arguments)
