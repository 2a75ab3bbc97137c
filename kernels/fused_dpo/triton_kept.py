"""Triton kernels that work on lists of kept columns or rows: compaction, dz of what is kept, and gathered products.

One list a group: the columns that a block of rows keeps (for the hidden states' gradient), or the rows that a narrow
block of columns keeps (for the weight's). Lists ascend. How long they are is known on the device alone, so every launch
covers the longest list there can be, and a program beyond the end of its own does nothing.
"""

import triton
import triton.language as tl

from fused_dpo.triton_tile import OF_BATCH, exp, logits_tile, named, through_softcap


@triton.jit
def _compact_kernel(flags_ptr, list_ptr, counts_ptr, N, stride_fg, stride_lg, BLOCK_N: tl.constexpr):
    """Positions of the set flags of each group, ascending, and how many there are.

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
    """dz of what is kept, in the hidden states' dtype.

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
        surprise = tl.load(state_ptr + 2 * T + rows, mask=mask_t, other=0.0)
        upstream = tl.load(upstream_ptr + offs_t, mask=mask_t, other=0.0)
        hit = offs_v[None, :] == target[:, None]
        dz = tl.where(hit, (upstream * surprise)[:, None], exp(z - peak[:, None]) * (-upstream / total)[:, None])
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
    """`out[group] (+)= a[group] @ b[list[group]]`: rows of `b` gathered by the group's list, in ascending order.

    Grid: (tiles of N, groups). `a` is `[BLOCK_M, slots]` by its strides, for slots `first` to `first + capacity` of the
    list: if PADDED the slots are contiguous, and 0 from the list's end to the next multiple of BLOCK_K; else the rows
    are, and all BLOCK_M can be read. With INDIRECT a list's entry goes through `index` first. `out` `[M, N]` has
    BLOCK_M rows a group: with ACCUMULATE fp32, added to, and left alone where no slot is live; else written once, times
    `unit`. Every entry has one writer, and no atomics. CORRECT takes `means` `[blocks, M]`, in memory whole groups
    wide, with `sums` `[blocks, N]` in as so many rows more.

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
