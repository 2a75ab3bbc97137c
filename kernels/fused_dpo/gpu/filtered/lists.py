"""Triton kernels that work on lists of kept columns or rows: compaction, dz of what is kept, and gathered products.

One list a group: the columns that a block of rows keeps (for the hidden states' gradient), or the rows that a narrow
block of columns keeps (for the weight's). Lists ascend. How long they are is known on the device alone, so every launch
covers the longest list there can be, and a program beyond the end of its own does nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fused_dpo.gpu.adapter import through_adapter
from fused_dpo.gpu.configs import ProductConfig, TileConfig, product_config
from fused_dpo.gpu.filtered.blocks import backward_config
from fused_dpo.gpu.filtered.dropped_means import TAIL_SCALE
from fused_dpo.gpu.launch import OF_BATCH, Tiles, architecture, launch, named
from fused_dpo.gpu.tile import exp, logits_tile, through_softcap
from fused_dpo.linalg.gradient_sums import GradientSums
from fused_dpo.linalg.matmul import matmul_precision
from fused_dpo.linalg.operands import Operands
from fused_dpo.linalg.sizes import ceil_div, round_up
from fused_dpo.stats import SoftmaxState


@triton.jit
def _compact_kernel(flags_ptr, list_ptr, counts_ptr, N, stride_fg, stride_lg, BLOCK_N: tl.constexpr):
    """List the positions of the set flags of each group, ascending, and count them.

    Grid: groups. Reads N contiguous bytes and writes at most 4·N a group; bound by latency.
    """
    group = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        flags = tl.load(flags_ptr + group * stride_fg + offs_n, mask=offs_n < N, other=0)
        flags = (flags != 0).to(tl.int32)
        at = count + tl.cumsum(flags, 0) - flags
        tl.store(list_ptr + group * stride_lg + at, offs_n, mask=flags != 0)
        count += tl.sum(flags)
    tl.store(counts_ptr + group, count)


@triton.jit(do_not_specialize=OF_BATCH, repr=named("_kept_dlogits_kernel", BY_COLUMNS=("columns", "rows")))
def _kept_dlogits_kernel(
    hidden_ptr,
    weight_ptr,
    inputs,
    row_index_ptr,
    target_ptr,
    state_ptr,
    upstream_ptr,
    list_ptr,
    counts_ptr,
    dz_ptr,
    residual_ptr,
    smallest_ptr,
    marks_ptr,
    keep_ptr,
    first,
    capacity,
    stride_lg,
    stride_mg,
    T,
    R,
    BY_COLUMNS: tl.constexpr,
    NARROW: tl.constexpr,
    OPTIONS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute dz of what is kept, in the hidden states' dtype.

    Grid: (groups, programs that share the tiles of a list). BY_COLUMNS: group g is the g-th block of BLOCK_T scored
    rows, its list holds columns, and slots `first` to `first + capacity` of it go to dz `[R, capacity]`, with zeros
    from the list's end to that of its tile. To `residual` `[tiles, R]` the sum of each row's tile is added, and `marks`
    `[narrow blocks, R]` gets a 1 where any of NARROW columns has an entry of the row above `smallest` `[R]` (all
    writers write the same). Else: group g is the columns from `first + g * BLOCK_V` on, its list holds scored rows, and
    dz is `[groups, capacity, BLOCK_V]`, 0 in columns that the row's block does not keep (`keep`, bool `[blocks, V]`),
    as those are corrected for the block as a whole.

    Roofline: 2·D FLOP for each of the tile's entries, bound by the matrix units; gathered rows of hidden states and
    head are contiguous, so they load like any others.
    """
    V = inputs.V
    group = tl.program_id(0)
    count = tl.load(counts_ptr + group)
    entries = list_ptr + group.to(tl.int64) * stride_lg
    tiles = tl.cdiv(tl.minimum(count - first, capacity), BLOCK_V) if BY_COLUMNS else tl.cdiv(count, BLOCK_T)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        if BY_COLUMNS:
            slots = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            offs_t = group * BLOCK_T + tl.arange(0, BLOCK_T)
            mask_t = offs_t < R
            offs_v = tl.load(entries + first + slots, mask=(first + slots < count) & (slots < capacity), other=V)
        else:
            slots = tile * BLOCK_T + tl.arange(0, BLOCK_T)
            mask_t = slots < count
            offs_t = tl.load(entries + slots, mask=mask_t, other=0)
            offs_v = first + group * BLOCK_V + tl.arange(0, BLOCK_V)
        rows = tl.load(row_index_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
        z = logits_tile(
            hidden_ptr, weight_ptr, inputs, rows, mask_t, offs_t, offs_v, 0, 0, OPTIONS, BLOCK_T, BLOCK_V, BLOCK_D
        )
        target = tl.load(target_ptr + rows, mask=mask_t, other=-1)
        target = tl.where(target < V, target, -1)  # slots without a column stand at V, and their dz is 0
        peak = tl.load(state_ptr + rows, mask=mask_t, other=float("inf"))
        total = tl.load(state_ptr + T + rows, mask=mask_t, other=1.0)
        one_minus_p = tl.load(state_ptr + 2 * T + rows, mask=mask_t, other=0.0)
        upstream = tl.load(upstream_ptr + offs_t, mask=mask_t, other=0.0)
        hit = offs_v[None, :] == target[:, None]
        dz = tl.where(hit, (upstream * one_minus_p)[:, None], exp(z - peak[:, None]) * (-upstream / total)[:, None])
        dz = tl.where((upstream == 0.0)[:, None], 0.0, dz)  # of an invalid label it is NaN until here
        if BY_COLUMNS:
            residual = residual_ptr + tile * R + offs_t
            tl.store(residual, tl.load(residual, mask=mask_t, other=0.0) + tl.sum(dz, axis=1), mask=mask_t)
            smallest = tl.load(smallest_ptr + offs_t, mask=mask_t, other=float("inf"))
            marks = marks_ptr + (offs_v // NARROW).to(tl.int64)[None, :] * stride_mg + offs_t[:, None]
            above = mask_t[:, None] & (offs_v < V)[None, :] & ~(tl.abs(dz) <= smallest[:, None])  # NaN is above
            tl.store(marks, tl.full([BLOCK_T, BLOCK_V], 1, dtype=tl.uint8), mask=above)
        dz = through_softcap(dz, z, inputs, OPTIONS)
        dz *= inputs.logit_scale * inputs.inverse_temperature
        if BY_COLUMNS:
            out = dz_ptr + offs_t.to(tl.int64)[:, None] * capacity + slots[None, :]
            tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=mask_t[:, None] & (slots < capacity)[None, :])
        else:
            at = (offs_t // BLOCK_T).to(tl.int64)[:, None] * V + offs_v[None, :]
            kept = tl.load(keep_ptr + at, mask=mask_t[:, None] & (offs_v < V)[None, :], other=0)
            dz = tl.where(kept != 0, dz, 0.0)
            out = dz_ptr + (group.to(tl.int64) * capacity + slots)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
            tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=mask_t[:, None])


@triton.jit(do_not_specialize=OF_BATCH, repr=named("_gathered_product_kernel", ACCUMULATE=("hidden", "weight")))
def _gathered_product_kernel(
    a_ptr,
    list_ptr,
    counts_ptr,
    index_ptr,
    b_ptr,
    means_ptr,
    sums_ptr,
    unit_ptr,
    out_ptr,
    blocks,
    first,
    capacity,
    stride_ag,
    stride_am,
    stride_ak,
    stride_lg,
    stride_bk,
    stride_bn,
    stride_tb,
    stride_om,
    M,
    N,
    PADDED: tl.constexpr,
    INDIRECT: tl.constexpr,
    CORRECT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute `out[group] (+)= a[group] @ b[list[group]]`, rows of `b` gathered by the group's list in its order.

    Grid: (tiles of N, groups). `a` is `[BLOCK_M, slots]` by its strides, for slots `first` to `first + capacity` of the
    list. PADDED: the slots are contiguous, and `a` is 0 from the list's end to the next multiple of BLOCK_K. Else the
    rows are contiguous, and all BLOCK_M can be read. INDIRECT: a list's entry is looked up in `index` first. `out`
    `[M, N]` has BLOCK_M rows a group. ACCUMULATE: `out` is fp32, is added to, and is left alone where no slot is live.
    Else it is written once, times `unit`. CORRECT: `means.T @ sums` is added, for `means` `[blocks, M]` and `sums`
    `[blocks, N]`; the memory of `means` is whole groups wide. Every entry has one writer, and there are no atomics.

    Roofline: 2·BLOCK_M·N FLOP a slot, bound by the matrix units; `b`'s gathered rows come from L2.
    """
    group = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    wide_n = offs_n.to(tl.int64)  # a transposed weight passes 2^31
    row = group.to(tl.int64) * BLOCK_M + offs_m
    mask_m = row < M
    live = tl.minimum(tl.load(counts_ptr + group) - first, capacity)
    entries = list_ptr + group.to(tl.int64) * stride_lg + first
    a_group = a_ptr + group.to(tl.int64) * stride_ag
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, live, BLOCK_K):
        slots = start + tl.arange(0, BLOCK_K)
        mask_k = slots < live
        at = tl.load(entries + slots, mask=mask_k, other=0)
        if INDIRECT:
            at = tl.load(index_ptr + at, mask=mask_k, other=0)
        wide = slots.to(tl.int64)
        # A mask along what is contiguous, whose length is known too late, would split loads into single entries.
        mask_a = mask_m[:, None] if PADDED else mask_k[None, :]
        a = tl.load(
            a_group + offs_m.to(tl.int64)[:, None] * stride_am + wide[None, :] * stride_ak, mask=mask_a, other=0.0
        )
        b = tl.load(
            b_ptr + at.to(tl.int64)[:, None] * stride_bk + wide_n[None, :] * stride_bn,
            mask=mask_k[:, None] & mask_n[None, :],
            other=0.0,
        )
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
    if CORRECT:
        for start in range(0, blocks, BLOCK_K):
            offs_b = start + tl.arange(0, BLOCK_K)
            mask_b = offs_b < blocks
            wide_b = offs_b.to(tl.int64)
            a = tl.load(means_ptr + wide_b[None, :] * stride_tb + row[:, None], mask=mask_b[None, :], other=0.0)
            b = tl.load(
                sums_ptr + wide_b[:, None] * N + offs_n[None, :], mask=mask_b[:, None] & mask_n[None, :], other=0.0
            )
            acc = tl.dot(a, b, acc, input_precision="ieee")
    out = out_ptr + row[:, None] * stride_om + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if ACCUMULATE:
        if live > 0:
            tl.store(out, tl.load(out, mask=mask, other=0.0) + acc, mask=mask)
    else:
        tl.store(out, (acc * tl.load(unit_ptr)).to(out_ptr.dtype.element_ty), mask=mask)


COMPACT_BLOCK = 4096
"""Flags that a program of the compaction takes at a time."""
LIST_PROGRAMS = 1024
"""Programs that share the tiles of all lists, at least if there are as many; one that finds none costs its start."""
BLOCKS_AT_ONCE = 8
"""Blocks of rows whose sums are taken at a time."""


class KeptLists:
    """Launches of the kernels that work on lists of kept columns and rows.

    Attributes:
        slots: of a list of rows: R in whole sixteens, for which the kernels are compiled, and flags are read at once.
    """

    def __init__(
        self, operands: Operands, target: Tensor, state: SoftmaxState, upstream: Tensor, workspace_mib: int
    ) -> None:
        hidden, rows, head = operands.hidden, operands.rows, operands.head
        self.operands, self.device = operands, hidden.device
        self.R, self.V = rows.numel(), operands.V
        self.slots = round_up(self.R, 16)
        self.config = backward_config(hidden, head)
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
            "state_ptr": state.values,
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
            out = sums.dhidden_sum
            if sums.needs.hidden:
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
        """Sum minus the upstream gradient times each row of `b` over the rows of each block, to [blocks, N].

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
        """List the set flags, bool [groups, N] with contiguous rows, and count them."""
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
        """Write dz of the lists into the workspace: of columns if the rows' sums go to `residual`, else of rows.

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
        """Compute `out (+)= dz @ b[lists]`: written times `unit` where that is given, else added."""
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
