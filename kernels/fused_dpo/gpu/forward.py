"""Triton forward: per-token log-probs by online softmax over vocabulary splits, logits never leaving the registers."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_dpo.gpu.adapter import through_adapter
from fused_dpo.gpu.configs import HOT_SPLITS, SPLIT_COLUMNS, TileConfig
from fused_dpo.gpu.exponentials import Exponentials
from fused_dpo.gpu.launch import OF_BATCH, Product, Tiles, WeightSlice, launch, named, weight_slices
from fused_dpo.gpu.merge import Results, empty_results, merge_splits
from fused_dpo.gpu.tile import exp, grouped_block, grouped_other, logits_tile
from fused_dpo.head import HeadInputs
from fused_dpo.linalg.sizes import ceil_div
from fused_dpo.stats import SoftmaxState, TokenStats
from fused_dpo.vocab_parallel.collectives import of_first_rank


@triton.jit(do_not_specialize=OF_BATCH, repr=named("_logps_forward_kernel", SCREEN=("screen", "")))
def _logps_forward_kernel(
    hidden_ptr,
    weight_ptr,
    inputs,
    row_index_ptr,
    target_ptr,
    peak_ptr,
    total_ptr,
    weighted_ptr,
    sum_ptr,
    picked_ptr,
    screen_ptr,
    tail_ptr,
    bound_ptr,
    exponentials_ptr,
    shift_ptr,
    filter_eps,
    hot_splits,
    first_split,
    group,
    stride_ev,
    saved_rows,
    R,
    squares_ptr,
    SPLIT_COLUMNS: tl.constexpr,
    OPTIONS: tl.constexpr,
    WANT_STATS: tl.constexpr,
    SCREEN: tl.constexpr,
    SAVE: tl.constexpr,
    FLATTENED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fold the logits of BLOCK_T scored rows into an online softmax, over one split of the vocabulary.

    Grid: row blocks x splits from `first_split` on, in the order of `grouped_block`. Each program writes, at
    `[split, row]`, the maximum of its logits and the sum of their exponentials above it (and for the stats the
    exponential-weighted and the plain sum of the logits, and the sum of the exponentials' squares), and at `[row]` the
    target's logit if the target lies in its columns: every entry has one writer. The product of hidden states and
    weight is formed here, or read if GIVEN.

    SCREEN adds what filtered gradients need, from tiles that are in registers anyway. Probabilities are known from
    above, by a bound on the log-sum-exp from below: `bound` [R], the log-sum-exp over the first `hot_splits`, which
    were run before, and what any other split has summed up so far. `screen` `[block, 2, V]` gets the exponents of each
    column's largest and mean in the block (see `fused_dpo.filtering`), `tail`, like `total`, the sum of what is at most
    `filter_eps` in its own row.

    SAVE leaves the exponentials of whole row blocks, `saved_rows` in all, for the backward, see
    `fused_dpo.gpu.exponentials`.

    Roofline: 2·R·D·V FLOP; bytes from memory are the weight once a group of row blocks (V·D) and the hidden states once
    (R·D), everything else comes from L2. Bound by the matrix units from a few hundred rows on. GIVEN: 4·R·V bytes, from
    L2 where the product still lies there.
    """
    V = inputs.V
    blocks = tl.cdiv(R, BLOCK_T)
    pid_t = grouped_block(blocks, group)
    split = first_split + grouped_other(blocks, group)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < R
    rows = tl.load(row_index_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
    target = tl.load(target_ptr + rows, mask=mask_t, other=-1)

    peak = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    weighted = tl.zeros([BLOCK_T], dtype=tl.float32)
    plain = tl.zeros([BLOCK_T], dtype=tl.float32)
    squares = tl.zeros([BLOCK_T], dtype=tl.float32)
    picked = tl.zeros([BLOCK_T], dtype=tl.float32)
    tail = tl.zeros([BLOCK_T], dtype=tl.float32)
    if SCREEN:
        bound = tl.load(bound_ptr + offs_t, mask=mask_t, other=0.0)
        one_of_block = 1.0 / tl.minimum(R - pid_t * BLOCK_T, BLOCK_T)
    first_v = split * SPLIT_COLUMNS
    for start_v in tl.range(first_v, tl.minimum(first_v + SPLIT_COLUMNS, V), BLOCK_V, flatten=FLATTENED):
        offs_v = start_v + tl.arange(0, BLOCK_V)
        z = logits_tile(
            hidden_ptr,
            weight_ptr,
            inputs,
            rows,
            mask_t,
            offs_t,
            offs_v,
            pid_t * BLOCK_T,
            start_v,
            OPTIONS,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
        )
        if tl.max(((target >= start_v) & (target < start_v + BLOCK_V)).to(tl.int32)) > 0:
            picked += tl.sum(tl.where(offs_v[None, :] == target[:, None], z, 0.0), axis=1)
        new_peak = tl.maximum(peak, tl.max(z, axis=1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row of -inf alone stays a sum of zeros
        weights = exp(z - shift[:, None])
        rescale = exp(peak - shift)
        total = total * rescale + tl.sum(weights, axis=1)
        if SAVE:
            # The same for all rows of the block, so that stores stay wide; triton 3.9's interpreter takes no scalars.
            mask_saved = tl.zeros([BLOCK_T], dtype=tl.int32) + pid_t * BLOCK_T < saved_rows
            mask = (offs_v < V)[None, :] & mask_saved[:, None]
            saved = exponentials_ptr + offs_v.to(tl.int64)[None, :] * stride_ev + offs_t[:, None]
            tl.store(saved, weights.to(exponentials_ptr.dtype.element_ty), mask=mask)
            of_tile = shift_ptr + start_v // BLOCK_V * saved_rows + offs_t
            tl.store(of_tile, shift, mask=mask_saved)
        if WANT_STATS:
            finite = tl.where(z == float("-inf"), 0.0, z)
            weighted = weighted * rescale + tl.sum(weights * finite, axis=1)
            plain += tl.sum(tl.where(offs_v[None, :] < V, z, 0.0), axis=1)
            squares = squares * (rescale * rescale) + tl.sum(weights * weights, axis=1)
        if SCREEN:
            own = tl.where(split < hot_splits, 0.0, total)  # is in the bound already
            above = own + exp(tl.minimum(bound - shift, 80.0))
            p = weights * tl.where(mask_t, 1.0 / tl.maximum(above, 1e-30), 0.0)[:, None]
            tail = tail * rescale + tl.sum(tl.where(p <= filter_eps, p, 0.0), axis=1) * above
            screen = screen_ptr + pid_t.to(tl.int64) * 2 * V + offs_v
            mean = tl.sum(p, axis=0) * one_of_block
            tl.store(screen + V, (mean.to(tl.int32, bitcast=True) >> 23).to(tl.uint8), mask=offs_v < V)
            largest = tl.max(p, axis=0)
            tl.store(screen, (largest.to(tl.int32, bitcast=True) >> 23).to(tl.uint8), mask=offs_v < V)
        peak = new_peak

    at = split.to(tl.int64) * R + offs_t
    tl.store(peak_ptr + at, peak, mask=mask_t)
    tl.store(total_ptr + at, total, mask=mask_t)
    if WANT_STATS:
        tl.store(weighted_ptr + at, weighted, mask=mask_t)
        tl.store(sum_ptr + at, plain, mask=mask_t)
        tl.store(squares_ptr + at, squares, mask=mask_t)
    if SCREEN:
        tl.store(tail_ptr + at, tail, mask=mask_t)
    mine = (target >= first_v) & (target < tl.minimum(first_v + SPLIT_COLUMNS, V))
    tl.store(picked_ptr + offs_t, picked, mask=mask_t & mine)


class Partials:
    """What the forward's programs write for the merge, and how both are launched; at least one row is scored."""

    def __init__(
        self,
        inputs: HeadInputs,
        results: Results,
        filter_eps: float,
        config: TileConfig,
        split_columns: int,
        exponentials: Exponentials | None = None,
    ) -> None:
        hidden, target, rows, head, _, self._shard = inputs
        self.splits = ceil_div(head.weight.shape[0], split_columns)
        self._rows, self._weight, self._results = rows, head.weight, results
        self._row_bytes = hidden.shape[1] * hidden.element_size()
        self._filter_eps, self._config, self._split_columns = filter_eps, config, split_columns
        R, device = rows.numel(), hidden.device
        with_stats, with_screen = results.stats is not None, results.screen is not None
        partials = iter(torch.empty(results.partials, self.splits, R, dtype=torch.float32, device=device))
        self._peak, self._total = next(partials), next(partials)
        self._arguments: dict[str, Any] = {
            "row_index_ptr": rows,
            "target_ptr": target,
            "peak_ptr": self._peak,
            "total_ptr": self._total,
            "weighted_ptr": next(partials) if with_stats else self._peak,
            "sum_ptr": next(partials) if with_stats else self._peak,
            "squares_ptr": next(partials) if with_stats else self._peak,
            "picked_ptr": torch.empty(R, dtype=torch.float32, device=device),
            "tail_ptr": next(partials) if with_screen else self._peak,
            "R": R,
            "WANT_STATS": with_stats,
        }
        self._saving: dict[str, Any] = {"SAVE": exponentials is not None}
        self._saving |= {"exponentials_ptr": self._peak, "shift_ptr": self._peak, "saved_rows": 0, "stride_ev": 0}
        if exponentials is not None:
            self._saving |= exponentials.arguments(hidden.dtype)
        lora_h = None if head.lora is None else through_adapter(hidden, rows, head.lora)
        self._tiles = Tiles(hidden, rows, head, lora_h, config)
        self._bound: tuple[Tensor, int] | None = None

    @property
    def has_hot_splits(self) -> bool:
        """Whether the first splits of the vocabulary are here."""
        return self._shard is None or self._shard.first == 0

    def bound(self, hot_splits: int) -> None:
        """Screen from here on, with the log-sum-exp over the first splits, which have run, as a bound on the whole.

        Where these are on another rank, it tells their log-sum-exp.
        """
        hot_splits = hot_splits if self.has_hot_splits else 0
        log_sum_exp = (self._peak[:hot_splits] + self._total[:hot_splits].log()).logsumexp(0)
        self._bound = of_first_rank(log_sum_exp, self._shard), hot_splits

    def forward(self, first_split: int, splits: int, source: WeightSlice | Product | None = None) -> None:
        """Run some splits of the vocabulary, for `source` see `Tiles.arguments`; screen them if bounded."""
        weight, R, config = self._weight, self._rows.numel(), self._config
        screening: dict[str, Any] = {"screen_ptr": self._peak, "bound_ptr": self._peak, "hot_splits": 0}
        if self._bound is not None:
            bound, hot_splits = self._bound
            screening = {"screen_ptr": self._results.screen, "bound_ptr": bound, "hot_splits": hot_splits}
        arguments: dict[str, Any] = {
            **self._tiles.arguments(source),
            **self._arguments,
            **screening,
            **self._saving,
            **config.constants,
            "FLATTENED": config.flattened,
            "SCREEN": self._bound is not None,
            "filter_eps": self._filter_eps,
            "first_split": first_split,
            "SPLIT_COLUMNS": self._split_columns,
            "group": config.blocks_in_cache(self._row_bytes),
        }
        launch(_logps_forward_kernel, (ceil_div(R, config.block_t) * splits,), weight, **arguments)

    def merge(self) -> None:
        """Merge all splits into the results of the rows."""
        R, V = self._rows.numel(), self._weight.shape[0]
        merge_splits(self._results, R, V, self.splits, self._arguments, self._shard)


Scan = Callable[[HeadInputs, Results, float], None]
"""Fills the results of scored rows, of one at least, with what is above a threshold in a screen."""


def fused_scan(
    inputs: HeadInputs,
    results: Results,
    filter_eps: float,
    *,
    config: TileConfig,
    exponentials: Exponentials | None = None,
) -> None:
    """Fill the results of all rows at once, by kernels that multiply; the logits never leave the registers."""
    hidden, _, _, head, workspace_mib, _ = inputs
    partials = Partials(inputs, results, filter_eps, config, SPLIT_COLUMNS, exponentials)
    V, D = head.weight.shape
    rows_at_once = V  # of the weight, in whole splits
    if head.weight.dtype != hidden.dtype:
        fits = workspace_mib * 2**20 // (SPLIT_COLUMNS * D * hidden.element_size())
        rows_at_once = max(fits, HOT_SPLITS) * SPLIT_COLUMNS
    for part in weight_slices(head.weight, hidden.dtype, rows_at_once):
        if results.screen is not None and part.first == 0:
            hot = min(HOT_SPLITS, partials.splits)
            if partials.has_hot_splits:
                partials.forward(0, hot, part)
            partials.bound(hot)
        partials.forward(part.first // SPLIT_COLUMNS, ceil_div(part.values.shape[0], SPLIT_COLUMNS), part)
    partials.merge()


def triton_forward(
    inputs: HeadInputs, scan: Scan, *, want_stats: bool
) -> tuple[Tensor, SoftmaxState, TokenStats | None]:
    """Compute log-prob and softmax state of every row, and the stats if wanted: `streaming_forward` on CUDA.

    Memory: log-prob and state, 16 bytes a row, and what the scan takes: 8 bytes (20 with stats) a scored row and split
    of SPLIT_COLUMNS columns; `workspace_mib` where the weight has another dtype. No synchronisation with the host.
    """
    results = empty_results(inputs.hidden, want_stats=want_stats)
    if inputs.rows.numel():
        scan(inputs, results, 0.0)
    return results.logps, results.state, results.token_stats
