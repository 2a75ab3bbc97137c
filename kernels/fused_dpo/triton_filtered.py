"""Screen, keep, correct on CUDA: the algorithm and error budget of `fused_dpo.filtering`, without a synchronisation.

The forward is the exact one, and notes from its tiles how large a probability each column reaches in a block of rows.
It runs the first split of the vocabulary, where byte-pair tokenizers have their most frequent tokens, once before: its
log-sum-exp bounds the whole one from below well enough to know a probability from above.

Once the upstream gradients are known, the backward lists the columns that each block of rows keeps, computes dz there,
and marks the rows that have something above the threshold in each narrow block of columns. dz is computed again for
those, so that either gradient is a product with gathered rows, in a fixed order, with one writer for each entry. What
lies in a kept column but in a row that is not marked, below the threshold, is left out of the weight's gradient.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_dpo.filtering import BIAS, EVERYTHING, Judgement
from fused_dpo.head import HeadGrads, LMHead
from fused_dpo.linalg.gradient_sums import GradientSums
from fused_dpo.linalg.matmul import in_range, matmul_precision
from fused_dpo.linalg.operands import Operands
from fused_dpo.linalg.sizes import ceil_div, round_up
from fused_dpo.stats import TokenStats
from fused_dpo.triton_adapter import through_adapter
from fused_dpo.triton_configs import (
    PLAIN,
    RICH,
    RICHEST,
    ProductConfig,
    TileConfig,
    epilogue_of,
    product_config,
    tile_config,
)
from fused_dpo.triton_forward import Scan, empty_results, fused_scan
from fused_dpo.triton_kept import _compact_kernel, _gathered_product_kernel, _kept_dlogits_kernel
from fused_dpo.triton_tail import TAIL_SCALE, DroppedMeans, dropped_means
from fused_dpo.triton_tile import Tiles, architecture, launch, weight_slices

COMPACT_BLOCK = 4096
"""Flags that a program of the compaction takes at a time."""
LIST_PROGRAMS = 1024
"""Programs that share the tiles of all lists, at least if there are as many; one that finds none costs its start."""
BLOCKS_AT_ONCE = 8
"""Blocks of rows whose sums are taken at a time."""


def _backward_config(hidden: Tensor, head: LMHead) -> TileConfig:
    """The reviewed tile shape, never a tuned one: its rows are the blocks of the screen."""
    epilogue = RICH if epilogue_of(head) == PLAIN else RICHEST
    return tile_config(architecture(hidden.device), hidden.dtype, epilogue)


def triton_screen_shape(hidden: Tensor, head: LMHead, rows: int) -> tuple[int, int, int]:
    """Shape of the screen for `rows` rows at most."""
    return ceil_div(rows, _backward_config(hidden, head).block_t), 2, head.weight.shape[0]


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
        R, V, config, device = rows.numel(), head.weight.shape[0], _backward_config(hidden, head), hidden.device
        blocks = ceil_div(R, config.block_t)
        columns = (screen[:blocks, 0] >= math.floor(BIAS + math.log2(filter_eps))).sum(1, dtype=torch.float32)
        mean_tail = _of_blocks(state[3, rows], blocks, config.block_t).sum(1) / _block_sizes(R, blocks, config, device)
        flat = ~(mean_tail <= tail_guard) | (columns > V // 2)  # NaN is not below the guard
        screen[:blocks, 0].masked_fill_(flat[:, None], EVERYTHING)
        flat_rows = flat.repeat_interleave(config.block_t)[:R]
        fraction = torch.where(flat, 1.0, columns / V).repeat_interleave(config.block_t)[:R]
        state[3].index_copy_(0, rows, state[3, rows].masked_fill(flat_rows, 0.0))
        state[4].index_copy_(0, rows, fraction)
    return logps, state, results.token_stats, screen


def _of_blocks(values: Tensor, blocks: int, block_t: int) -> Tensor:
    """Values of the scored rows [R] as [blocks, block_t], 0 beyond the last row."""
    return F.pad(values, (0, blocks * block_t - values.numel())).view(blocks, block_t)


def _block_sizes(R: int, blocks: int, config: TileConfig, device: torch.device) -> Tensor:
    starts = torch.arange(blocks, device=device) * config.block_t
    return (R - starts).clamp(max=config.block_t)


def triton_filtered_backward(
    dlogps: Tensor,
    hidden: Tensor,
    target: Tensor,
    rows: Tensor,
    state: Tensor,
    head: LMHead,
    workspace_mib: int,
    *,
    cu_seqlens: Tensor,
    screen: Tensor,
    filter_eps: float,
    needs: tuple[bool, bool, bool, bool, bool],
) -> HeadGrads:
    """Gradients of `sum(dlogps * logps)`, only those asked for: `filtered_backward` on CUDA.

    Numerics: dz is held in the hidden states' dtype (fp16: scaled so that its largest upstream gradient is 1); both
        products accumulate in fp32. No atomics.
    Memory: `workspace_mib`, 4·D bytes a scored row for the hidden states' gradient, 5·V bytes a block of rows for its
        kept columns, V/64 bytes a row, and a copy of 1024 hidden states. No synchronisation with the host.
    """
    del cu_seqlens
    sums = GradientSums(Operands(hidden, rows, head), 0, needs, empty=not rows.numel())
    if rows.numel():
        _add_kept(sums, dlogps[rows].float(), target, state, screen, workspace_mib, filter_eps)
    return sums.finish()


def _add_kept(
    sums: GradientSums,
    upstream: Tensor,
    target: Tensor,
    state: Tensor,
    screen: Tensor,
    workspace_mib: int,
    filter_eps: float,
) -> None:
    """Add what is kept, and what stands for the rest, to the hidden states' sums; write the other gradients."""
    operands, device = sums.operands, upstream.device
    rows, R, V = operands.rows, operands.rows.numel(), operands.V
    upstream, unit = in_range(upstream, operands.dtype)
    kept = _KeptLists(operands, target, state, upstream, workspace_mib)
    blocks, config = kept.blocks, kept.config
    block_of_row = torch.arange(R, device=device) // config.block_t
    judgement = Judgement(block_of_row, blocks, upstream, state[2, rows], target[rows], filter_eps)
    flat = (screen[:blocks, 0, 0] == EVERYTHING)[block_of_row] & (judgement.magnitude > judgement.negligible)
    marks = F.pad(flat, (0, kept.slots - R)).expand(ceil_div(V, config.narrow), -1).contiguous()
    keep = judgement.columns(screen[:blocks, 0])
    residual = kept.add_hidden_gradient(keep, judgement.smallest[block_of_row], marks, sums)
    offset = _of_blocks((state[0, rows] + state[1, rows].log()), blocks, config.block_t).sum(1)
    means = dropped_means(operands, screen[:blocks, 1], keep, offset / _block_sizes(R, blocks, config, device))
    if sums.hidden.shape[1]:
        _subtract_spread(sums.hidden, residual, _spread_of_blocks(sums, means, workspace_mib), config.block_t)
        if unit is not None:
            sums.hidden *= unit
    if sums.dweight is not None or sums.dbias is not None or sums.dlora_b is not None:
        judged = torch.where(judgement.magnitude > judgement.negligible, upstream, 0.0)
        unit = upstream.new_ones(()) if unit is None else unit
        kept.write_weight_gradients(marks, keep, sums, means.values, _of_blocks(judged, blocks, config.block_t), unit)


def _spread_of_blocks(sums: GradientSums, means: DroppedMeans, workspace_mib: int) -> Tensor:
    """`q @ [weight | b]` of every block, the columns that the sums have; q what it drops over what that sums to."""
    head, dtype = sums.operands.head, means.values.dtype
    spread = means.mass.new_zeros(len(means.mass), sums.hidden.shape[1])
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


class _KeptLists:
    """Launches of the kernels that work on lists of kept columns and rows.

    Attributes:
        slots: of a list of rows: R in whole sixteens, for which the kernels are compiled, and flags are read at once.
    """

    def __init__(self, operands: Operands, target: Tensor, state: Tensor, upstream: Tensor, workspace_mib: int) -> None:
        hidden, rows, head = operands.hidden, operands.rows, operands.head
        self.operands, self.device = operands, hidden.device
        self.R, self.V = rows.numel(), operands.V
        self.slots = round_up(self.R, 16)
        self.config = _backward_config(hidden, head)
        self.product: ProductConfig = product_config(architecture(hidden.device), hidden.dtype)
        self.blocks = ceil_div(self.R, self.config.block_t)
        multiple = max(self.config.block_v, self.config.narrow)
        quarters = 4 if head.weight.dtype == hidden.dtype else 3  # one for slices of the weight that are converted
        fits = quarters * workspace_mib * 2**18 // (self.slots * hidden.element_size()) // multiple * multiple
        self.width = min(max(fits, multiple), round_up(self.V, multiple))
        self._lora_h = None if head.lora is None else through_adapter(hidden, rows, head.lora)
        self._tile: dict[str, Any] = {
            **Tiles(hidden, rows, head, self._lora_h).arguments(),
            "row_index_ptr": rows,
            "target_ptr": target,
            "state_ptr": state,
            "T": hidden.shape[0],
            "upstream_ptr": upstream,
            "R": self.R,
        }
        self._dz = torch.empty(self.slots * self.width, dtype=hidden.dtype, device=self.device)
        self._counts = torch.empty(
            max(self.blocks, self.width // self.config.narrow), dtype=torch.int32, device=self.device
        )

    def add_hidden_gradient(self, keep: Tensor, smallest: Tensor, marks: Tensor, sums: GradientSums) -> Tensor:
        """Add `dz @ weight` over the kept columns, bool [blocks, V]; returns what each row of dz sums to there [R].

        Sets `marks`, bool [narrow blocks of columns, slots], where a row has an entry above its `smallest` [R].
        """
        config, operands, head = self.config, self.operands, self.operands.head
        columns = torch.empty(self.blocks, self.V, dtype=torch.int32, device=self.device)
        self._compact(keep, columns)
        tiles = self.width // config.block_v
        residual = torch.zeros(tiles, self.R, dtype=torch.float32, device=self.device)
        lists: dict[str, Any] = {"list_ptr": columns, "counts_ptr": self._counts, "stride_lg": columns.stride(0)}
        lists |= {"capacity": self.width, "smallest_ptr": smallest, "keep_ptr": keep}
        lists |= {"marks_ptr": marks, "stride_mg": marks.stride(0)}
        products = {"list_ptr": columns, "counts_ptr": self._counts, "stride_lg": self.V, "capacity": self.width}
        products |= {"stride_ag": config.block_t * self.width, "stride_am": self.width, "stride_ak": 1}
        for first in range(0, self.V, self.width):
            self._dlogits(self.config, lists, self.blocks, tiles, first, residual)
            out = sums.hidden
            if sums.need_hidden:
                self._product(head.weight, out[:, : operands.D], products, first, config.block_t)
            if operands.rank and head.lora is not None and out.shape[1]:
                self._product(head.lora[1], out[:, -operands.rank :], products, first, config.block_t)
        return residual.sum(0)

    def write_weight_gradients(
        self, marks: Tensor, keep: Tensor, sums: GradientSums, means: Tensor, upstream: Tensor, unit: Tensor
    ) -> None:
        """Write `dz.T @ hidden`, and the same for bias and adapter, from the rows in `marks` [narrow blocks, slots].

        What is dropped takes part by `means` [blocks, V]: `upstream` is that of the rows in blocks [blocks, rows].
        """
        config, operands, narrow = self.config, self.operands, self.config.narrow
        others: list[tuple[Tensor, Tensor, Tensor | None]] = []  # rows to gather, where to write, index of the rows
        if sums.dweight is not None:
            others.append((operands.hidden, sums.dweight, operands.rows))
        if sums.dlora_b is not None and self._lora_h is not None:
            others.append((self._lora_h, sums.dlora_b, None))
        if sums.dbias is not None:
            others.append((torch.ones(self.R, 1, dtype=operands.dtype, device=self.device), sums.dbias[:, None], None))
        block_sums = [self._block_sums(upstream, b, index) for b, _, index in others]
        slots = self.slots
        rows = torch.empty(self.width // narrow, slots, dtype=torch.int32, device=self.device)
        lists: dict[str, Any] = {"list_ptr": rows, "counts_ptr": self._counts, "stride_lg": slots, "capacity": slots}
        dz_of = lists | {"keep_ptr": keep, "smallest_ptr": self._dz, "marks_ptr": self._dz, "stride_mg": 0}
        strides = {"stride_ag": slots * narrow, "stride_am": 1, "stride_ak": narrow}
        for first in range(0, len(marks), self.width // narrow):
            groups = min(self.width // narrow, len(marks) - first)
            self._compact(marks[first : first + groups], rows)
            start, stop = first * narrow, min((first + groups) * narrow, self.V)
            self._dlogits(config.of_rows, dz_of, groups, ceil_div(self.R, config.block_t), start)
            for (b, out, index), of_blocks in zip(others, block_sums, strict=True):
                correction = means[:, start:stop], of_blocks
                self._product(b, out[start:stop], lists | strides, 0, narrow, unit, index, correction)

    def _block_sums(self, upstream: Tensor, b: Tensor, index: Tensor | None) -> Tensor:
        """Sums over each block's rows of minus the upstream [blocks, rows] times row of `b`, [blocks, N].

        In the unit that makes up for that of `DroppedMeans`.
        """
        (blocks, block_t), head = upstream.shape, self.operands.head
        weights = (upstream * (-head.logit_scale / head.temperature / TAIL_SCALE)).to(b.dtype)[:, None]
        sums = torch.empty(blocks, 1, b.shape[1], dtype=b.dtype, device=self.device)
        for first in range(0, blocks, BLOCKS_AT_ONCE):  # a few at a time: gathered rows are as large as the batch
            here = slice(first, min(first + BLOCKS_AT_ONCE, blocks))
            span = slice(here.start * block_t, min(here.stop * block_t, self.R))
            part = b[span] if index is None else b.index_select(0, index[span])
            missing = (here.stop - here.start) * block_t - part.shape[0]
            part = F.pad(part, (0, 0, 0, missing)) if missing else part
            with matmul_precision(torch.float32):
                torch.bmm(weights[here], part.view(-1, block_t, b.shape[1]), out=sums[here])
        return sums.squeeze(1)

    def _compact(self, flags: Tensor, lists: Tensor) -> None:
        """Lists of the set flags, bool [groups, N] with contiguous rows, and their lengths."""
        groups, N = flags.shape
        arguments: dict[str, Any] = {"flags_ptr": flags, "list_ptr": lists, "counts_ptr": self._counts, "N": N}
        arguments |= {"stride_fg": flags.stride(0), "stride_lg": lists.stride(0)}
        arguments |= {"BLOCK_N": COMPACT_BLOCK, "num_warps": 8}
        launch(_compact_kernel, (groups,), flags, **arguments)

    def _dlogits(
        self,
        tile: TileConfig,
        lists: dict[str, Any],
        groups: int,
        tiles: int,
        first: int,
        residual: Tensor | None = None,
    ) -> None:
        """dz of the lists into the workspace: of columns if the rows' sums go to `residual`, else of rows.

        Of at most so many tiles a list.
        """
        grid = groups, min(tiles, ceil_div(LIST_PROGRAMS, groups))
        arguments: dict[str, Any] = {**self._tile, **lists}
        arguments |= {"dz_ptr": self._dz, "first": first, "NARROW": self.config.narrow, **tile.constants}
        arguments |= {"residual_ptr": self._dz if residual is None else residual, "BY_COLUMNS": residual is not None}
        launch(_kept_dlogits_kernel, grid, self._dz, **arguments)

    def _product(
        self,
        b: Tensor,
        out: Tensor,
        arguments: dict[str, Any],
        first: int,
        block_m: int,
        unit: Tensor | None = None,
        index: Tensor | None = None,
        correction: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """`out (+)= dz @ b[lists]`, written times `unit` where there is one, else added."""
        M, N = out.shape
        shape = self.product
        grid = ceil_div(N, shape.block_n), ceil_div(M, block_m)
        options: dict[str, Any] = {"BLOCK_M": block_m, "ACCUMULATE": unit is None, "INDIRECT": index is not None}
        options["PADDED"] = unit is None  # lists of columns, whose tiles are filled up
        options |= {"first": first, "M": M, "N": N, "stride_om": out.stride(0)}
        options |= {"a_ptr": self._dz, "b_ptr": b, "stride_bk": b.stride(0), "stride_bn": b.stride(1), "out_ptr": out}
        options["unit_ptr"] = self._dz if unit is None else unit
        options["index_ptr"] = arguments["list_ptr"] if index is None else index
        means, of_blocks = (self._dz, self._dz) if correction is None else correction
        options |= {"means_ptr": means, "sums_ptr": of_blocks, "CORRECT": correction is not None}
        options |= {"blocks": self.blocks, "stride_tb": means.stride(0)}
        launch(_gathered_product_kernel, grid, out, **arguments, **options, **shape.constants)
