"""Triton forward: per-token log-probs by online softmax over vocabulary splits, logits never leaving the registers."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_dpo.head import LMHead
from fused_dpo.stats import TokenStats
from fused_dpo.triton_autotune import choose_config
from fused_dpo.triton_configs import SPLIT_COLUMNS, TileConfig
from fused_dpo.triton_tile import architecture, logits_tile, on_device, surprise_of, tile_arguments

MERGE_ROWS = 128
"""Rows a program of the merge takes."""


@triton.jit
def _logps_forward_kernel(
    hidden_ptr,
    row_index_ptr,
    target_ptr,
    weight_ptr,
    bias_ptr,
    lora_h_ptr,
    lora_b_ptr,
    peak_ptr,
    total_ptr,
    weighted_ptr,
    sum_ptr,
    picked_ptr,
    screen_ptr,
    tail_ptr,
    bound_ptr,
    filter_eps,
    hot_splits,
    R,
    V,
    D,
    stride_ht,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_bv,
    stride_br,
    logit_scale,
    softcap,
    inverse_temperature,
    SPLIT_COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_STATS: tl.constexpr,
    SCREEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Online softmax of BLOCK_T scored rows over one split of the vocabulary.

    Grid: (row blocks, splits), row blocks fastest, so that programs at work together share a split of the weight in the
    L2 cache and the hidden states stay there. Each program writes, at `[split, row]`, the maximum of its logits and the
    sum of their exponentials above it (and for the stats the exponential-weighted and the plain sum of the logits), and
    at `[row]` the target's logit if the target lies in its columns: every entry has one writer.

    SCREEN adds what filtered gradients need, from tiles that are in registers anyway. Probabilities are known from
    above, by a bound on the log-sum-exp from below: `bound` [R], the log-sum-exp over the first `hot_splits`, which
    were run before, and what any other split has summed up so far. `screen` `[block, 2, V]` gets the exponents of each
    column's largest and mean in the block (see `fused_dpo.screen`), `tail`, like `total`, the sum of what is at most
    `filter_eps` in its own row.

    Roofline: 2·R·D·V FLOP; bytes are the weight once (V·D) plus the hidden states once from memory (R·D), everything
    else from L2. Bound by the matrix units from a few hundred rows on.
    """
    pid_t = tl.program_id(0)
    split = tl.program_id(1)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < R
    rows = tl.load(row_index_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
    target = tl.load(target_ptr + rows, mask=mask_t, other=-1)

    peak = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    weighted = tl.zeros([BLOCK_T], dtype=tl.float32)
    plain = tl.zeros([BLOCK_T], dtype=tl.float32)
    picked = tl.zeros([BLOCK_T], dtype=tl.float32)
    tail = tl.zeros([BLOCK_T], dtype=tl.float32)
    if SCREEN:
        bound = tl.load(bound_ptr + offs_t, mask=mask_t, other=0.0)
    first_v = split * SPLIT_COLUMNS
    for start_v in range(first_v, tl.minimum(first_v + SPLIT_COLUMNS, V), BLOCK_V):
        offs_v = start_v + tl.arange(0, BLOCK_V)
        z = logits_tile(
            hidden_ptr,
            rows,
            mask_t,
            weight_ptr,
            offs_v,
            bias_ptr,
            lora_h_ptr,
            offs_t,
            lora_b_ptr,
            V,
            D,
            stride_ht,
            stride_hd,
            stride_wv,
            stride_wd,
            stride_bv,
            stride_br,
            logit_scale,
            softcap,
            inverse_temperature,
            RANK,
            BLOCK_R,
            HAS_BIAS,
            HAS_SOFTCAP,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
        )
        hit = offs_v[None, :] == target[:, None]
        picked += tl.sum(tl.where(hit, z, 0.0), axis=1)
        new_peak = tl.maximum(peak, tl.max(z, axis=1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row of -inf alone stays a sum of zeros
        weights = tl.exp(z - shift[:, None])
        rescale = tl.exp(peak - shift)
        total = total * rescale + tl.sum(weights, axis=1)
        if WANT_STATS:
            finite = tl.where(z == float("-inf"), 0.0, z)
            weighted = weighted * rescale + tl.sum(weights * finite, axis=1)
            plain += tl.sum(tl.where(offs_v[None, :] < V, z, 0.0), axis=1)
        if SCREEN:
            own = tl.where(split < hot_splits, 0.0, total)  # is in the bound already
            above = own + tl.exp(tl.minimum(bound - shift, 80.0))
            p = weights * tl.where(mask_t, 1.0 / tl.maximum(above, 1e-30), 0.0)[:, None]
            tail = tail * rescale + tl.sum(tl.where(p <= filter_eps, p, 0.0), axis=1) * above
            screen = screen_ptr + pid_t.to(tl.int64) * 2 * V + offs_v
            largest = tl.max(p, axis=0).to(tl.int32, bitcast=True) >> 23
            tl.store(screen, largest.to(tl.uint8), mask=offs_v < V)
            mean = tl.sum(p, axis=0) / tl.minimum(R - pid_t * BLOCK_T, BLOCK_T)
            tl.store(screen + V, (mean.to(tl.int32, bitcast=True) >> 23).to(tl.uint8), mask=offs_v < V)
        peak = new_peak

    at = split.to(tl.int64) * R + offs_t
    tl.store(peak_ptr + at, peak, mask=mask_t)
    tl.store(total_ptr + at, total, mask=mask_t)
    if WANT_STATS:
        tl.store(weighted_ptr + at, weighted, mask=mask_t)
        tl.store(sum_ptr + at, plain, mask=mask_t)
    if SCREEN:
        tl.store(tail_ptr + at, tail, mask=mask_t)
    mine = (target >= first_v) & (target < tl.minimum(first_v + SPLIT_COLUMNS, V))
    tl.store(picked_ptr + offs_t, picked, mask=mask_t & mine)


@triton.jit
def _merge_splits_kernel(
    peak_ptr,
    total_ptr,
    weighted_ptr,
    sum_ptr,
    picked_ptr,
    row_index_ptr,
    target_ptr,
    logps_ptr,
    state_ptr,
    stats_ptr,
    tail_ptr,
    T,
    R,
    V,
    SPLITS: tl.constexpr,
    WANT_STATS: tl.constexpr,
    SCREEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Merge the splits of each row, in ascending order, into the softmax's state and the log-prob.

    Grid: row blocks. Reads 2·SPLITS numbers a row and writes 3 into the rows' places among all T; bound by latency.
    """
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < R
    peak = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    for split in range(SPLITS):
        at = tl.full([BLOCK_T], split, dtype=tl.int64) * R + offs_t
        peak = tl.maximum(peak, tl.load(peak_ptr + at, mask=mask_t, other=float("-inf")))
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    weighted = tl.zeros([BLOCK_T], dtype=tl.float32)
    plain = tl.zeros([BLOCK_T], dtype=tl.float32)
    tail = tl.zeros([BLOCK_T], dtype=tl.float32)
    for split in range(SPLITS):
        at = tl.full([BLOCK_T], split, dtype=tl.int64) * R + offs_t
        rescale = tl.exp(tl.load(peak_ptr + at, mask=mask_t, other=float("-inf")) - shift)
        total += tl.load(total_ptr + at, mask=mask_t, other=0.0) * rescale
        if WANT_STATS:
            weighted += tl.load(weighted_ptr + at, mask=mask_t, other=0.0) * rescale
            plain += tl.load(sum_ptr + at, mask=mask_t, other=0.0)
        if SCREEN:
            tail += tl.load(tail_ptr + at, mask=mask_t, other=0.0) * rescale
    log_total = tl.log(total)
    rows = tl.load(row_index_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
    target = tl.load(target_ptr + rows, mask=mask_t, other=0)
    picked = tl.load(picked_ptr + offs_t, mask=mask_t & (target >= 0) & (target < V), other=float("nan"))
    logp = picked - shift - log_total
    tl.store(logps_ptr + rows, logp, mask=mask_t)
    tl.store(state_ptr + rows, shift, mask=mask_t)
    tl.store(state_ptr + T + rows, total, mask=mask_t)
    if SCREEN:
        tl.store(state_ptr + 2 * T + rows, tail / total, mask=mask_t)
        tl.store(state_ptr + 4 * T + rows, surprise_of(logp), mask=mask_t)
    if WANT_STATS:
        tl.store(stats_ptr + rows, log_total - (weighted / total - shift), mask=mask_t)
        tl.store(stats_ptr + T + rows, plain / V, mask=mask_t)
        tl.store(stats_ptr + 2 * T + rows, tl.where(picked >= peak, 1.0, 0.0), mask=mask_t)


class Partials:
    """What the forward's programs write for the merge, and how both are launched."""

    def __init__(self, hidden: Tensor, target: Tensor, rows: Tensor, head: LMHead, *, want_stats: bool) -> None:
        self.hidden, self.rows, self.V = hidden, rows, head.weight.shape[0]
        self.splits = -(-self.V // SPLIT_COLUMNS)
        self.want_stats = want_stats
        R, device = rows.numel(), hidden.device
        partials = torch.empty(4 if want_stats else 2, self.splits, R, dtype=torch.float32, device=device)
        self.peak, self.total = partials[0], partials[1]
        weighted, plain = (partials[2], partials[3]) if want_stats else (self.peak, self.peak)
        self._shared: dict[str, Any] = {
            "row_index_ptr": rows,
            "target_ptr": target,
            "peak_ptr": self.peak,
            "total_ptr": self.total,
            "weighted_ptr": weighted,
            "sum_ptr": plain,
            "picked_ptr": torch.empty(R, dtype=torch.float32, device=device),
            "R": R,
            "WANT_STATS": want_stats,
        }
        self._tile = tile_arguments(hidden, rows, head)

    def forward(self, config: TileConfig, splits: int, screen: dict[str, Any] | None = None) -> None:
        """Run the first `splits` of the vocabulary; `screen` are the arguments that SCREEN adds."""
        grid = triton.cdiv(self.rows.numel(), config.block_t), splits
        arguments: dict[str, Any] = {**self._tile, **self._shared, **config.constants, "SPLIT_COLUMNS": SPLIT_COLUMNS}
        unused = {"screen_ptr": self.peak, "tail_ptr": self.peak, "bound_ptr": self.peak}
        unused |= {"filter_eps": 0.0, "hot_splits": 0, "SCREEN": False}
        arguments |= screen or unused
        with on_device(self.hidden):
            _logps_forward_kernel[grid](**arguments)

    def merge(self, logps: Tensor, state: Tensor, stats: Tensor | None, tail: Tensor | None = None) -> None:
        """Merge all splits into per-row results."""
        arguments: dict[str, Any] = {"SPLITS": self.splits, "BLOCK_T": MERGE_ROWS, "T": logps.shape[0], "V": self.V}
        arguments |= {"logps_ptr": logps, "state_ptr": state, "stats_ptr": state if stats is None else stats}
        arguments |= {"tail_ptr": self.peak if tail is None else tail, "SCREEN": tail is not None}
        with on_device(self.hidden):
            _merge_splits_kernel[(triton.cdiv(self.rows.numel(), MERGE_ROWS),)](**self._shared, **arguments)


def triton_forward(
    hidden: Tensor,
    target: Tensor,
    rows: Tensor,
    head: LMHead,
    _workspace_mib: int,
    *,
    want_stats: bool,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, TokenStats | None]:
    """Log-prob and softmax state of every row, and the stats if wanted: `streaming_forward` on CUDA.

    Memory: log-prob and state, 12 bytes a row, and 8 bytes (16 with stats) a scored row and split of SPLIT_COLUMNS
    columns. No synchronisation with the host.
    """
    T = hidden.shape[0]
    config = config or choose_config(architecture(hidden.device), hidden, head, want_stats=want_stats)
    logps = torch.zeros(T, dtype=torch.float32, device=hidden.device)
    state = torch.zeros(2, T, dtype=torch.float32, device=hidden.device)
    stats = torch.zeros(3, T, dtype=torch.float32, device=hidden.device) if want_stats else None
    if rows.numel():
        partials = Partials(hidden, target, rows, head, want_stats=want_stats)
        partials.forward(config, partials.splits)
        partials.merge(logps, state, stats)
    return logps, state, None if stats is None else TokenStats(*stats.unbind(0))
