"""Per-token log-probs and their exact gradients by vocabulary slices: plain torch, any device, no `[T, V]` logits.

Forward (online softmax; Milakov & Gimelshein, 2018, arXiv 1805.02867): the head is walked in slices of its rows, and
each tile of logits `[ROWS_PER_TILE, slice]` is folded into a running maximum and sum of every scored row. Backward: the
tiles are recomputed, turned into `dz = dlogps * (onehot - softmax)` in place, and multiplied into both gradients.

What is summed how: logits, log-sum-exp and both gradients accumulate in fp32 (float64 for float64 inputs) and are
rounded once, on the way out. Rows that are not scored are never gathered.

A low-rank adapter widens the product: `hidden @ weight.T + scale * (hidden @ a.T) @ b.T` is one product of
`[hidden | scale * hidden @ a.T]` with `[weight | b]`, so the code below knows operands of K >= D + r columns and
nothing else; their gradients come out side by side in the same way.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_dpo.head import HeadGrads, LMHead
from fused_dpo.precision import accumulate_product, accumulation_dtype, as_operand, matmul_precision, product
from fused_dpo.stats import TokenStats

ROWS_PER_TILE = 256
"""Scored rows per tile: enough to feed the matrix units, few enough that a tile stays in cache."""
ROW_MULTIPLE = 64
"""The last tile is padded to a multiple of this. BLAS takes other inner loops for a handful of rows and answers with
other bits, which would make a sequence's log-prob depend on the batch around it."""
INNER_MULTIPLE = 64
"""Hidden dimensions are padded with zeros to a multiple of this, for the same reason: real heads need no padding."""
MAX_SLICE_CPU, MAX_SLICE = 4096, 32768
"""Vocabulary columns per tile at most: on a CPU a tile has to stay in cache, elsewhere it has to fill the device."""


class _Slice(NamedTuple):
    """Rows `start:stop` of the head."""

    start: int
    stop: int
    weight: Tensor
    """Operand [columns, K]."""
    bias: Tensor | None


class _Block(NamedTuple):
    """Rows `span` of the padded scored rows."""

    span: slice
    hidden: Tensor
    """Operand [rows, K]."""


def slice_bounds(V: int, K: int, workspace_mib: int, dtype: torch.dtype, device: torch.device) -> list[tuple[int, int]]:
    """Bounds of the vocabulary slices: nearly equal, and a function of V, K, dtype and workspace alone.

    Per column a slice holds K numbers of weight (and those once more while they are converted), K of its gradient, and
    two tiles of ROWS_PER_TILE logits; beside it stands one block of hidden states.
    """
    itemsize = accumulation_dtype(dtype).itemsize
    block_bytes = 2 * ROWS_PER_TILE * K * itemsize
    column_bytes = (2 * K + 2 * ROWS_PER_TILE) * itemsize + K * dtype.itemsize
    fits = max((workspace_mib * 2**20 - block_bytes) // column_bytes, 16)
    count = -(-V // min(fits, MAX_SLICE_CPU if device.type == "cpu" else MAX_SLICE, V))
    return [(V * i // count, V * (i + 1) // count) for i in range(count)]


class _Tiles:
    """Tiles of logits of the scored rows, recomputed alike in forward and backward.

    Scored rows are padded to ROW_MULTIPLE, and so is every per-row state: padded rows compute along and are cut off at
    the end.
    """

    def __init__(self, hidden: Tensor, rows: Tensor, head: LMHead, workspace_mib: int) -> None:
        self.hidden, self.rows, self.head = hidden, rows, head
        self.dtype = hidden.dtype
        self.acc_dtype = accumulation_dtype(hidden.dtype)
        self.padded_rows = _round_up(rows.numel(), ROW_MULTIPLE)
        V, self.D = head.weight.shape
        self.rank = 0 if head.lora is None else head.lora[0].shape[0]
        K = _round_up(self.D + self.rank, INNER_MULTIPLE)
        bounds = slice_bounds(V, K, workspace_mib, hidden.dtype, hidden.device)
        self.bounds = bounds if rows.numel() else []
        self.width = max(stop - start for start, stop in bounds)
        tile_rows = min(ROWS_PER_TILE, self.padded_rows)
        operand_dtype = as_operand(hidden[:0], self.dtype).dtype
        self._weight = hidden.new_zeros(self.width if rows.numel() else 0, K, dtype=operand_dtype)
        self._block = hidden.new_zeros(tile_rows, K, dtype=operand_dtype)
        self._logits = hidden.new_empty(tile_rows * self.width, dtype=self.acc_dtype)
        self._scratch = torch.empty_like(self._logits)

    def of_rows(self, values: Tensor, fill: float) -> Tensor:
        """Values of the scored rows out of those of all rows, padded with `fill`."""
        state = values.new_full((self.padded_rows,), fill)
        state[: self.rows.numel()] = values[self.rows]
        return state

    def to_rows(self, state: Tensor) -> Tensor:
        """The inverse of `of_rows`, with 0 where a row is not scored."""
        return state.new_zeros(self.hidden.shape[0]).index_copy_(0, self.rows, state[: self.rows.numel()])

    def slices(self) -> Iterator[_Slice]:
        """The head, a slice at a time, converted once into a buffer that the next slice overwrites."""
        head, D = self.head, self.D
        for start, stop in self.bounds:
            weight = self._weight[: stop - start]
            weight[:, :D] = head.weight[start:stop].to(self.dtype)
            if head.lora is not None:
                weight[:, D : D + self.rank] = head.lora[1][start:stop].to(self.dtype)
            bias = None if head.bias is None else head.bias[start:stop].to(self.acc_dtype)
            yield _Slice(start, stop, weight, bias)

    def blocks(self) -> Iterator[_Block]:
        """The scored rows, a block at a time, in a buffer that the next block overwrites."""
        D = self.D
        for start in range(0, self.padded_rows, ROWS_PER_TILE):
            stop = min(start + ROWS_PER_TILE, self.padded_rows)
            rows = self.rows[start:stop]
            block = self._block[: stop - start]
            block[: rows.numel(), :D] = self.hidden[rows]
            block[rows.numel() :, :D] = 0.0
            if self.head.lora is not None:
                a, _, scale = self.head.lora
                wide_a = a.new_zeros(self.rank, self._block.shape[1], dtype=self.acc_dtype)
                wide_a[:, :D] = a.to(self.dtype)
                block[:, D:] = 0.0  # what an earlier block left there must not meet the zeros of `wide_a` as NaN
                with matmul_precision(self.acc_dtype):
                    through_a = scale * (block.to(self.acc_dtype) @ wide_a.T)
                block[:, D : D + self.rank] = through_a.to(self.dtype)
            yield _Block(slice(start, stop), block)

    def logits(self, block: _Block, cut: _Slice) -> Tensor:
        """One tile `[rows, columns]`, in a buffer that the next call overwrites."""
        shape = block.hidden.shape[0], cut.stop - cut.start
        tile = self._logits[: shape[0] * shape[1]].view(shape)
        with matmul_precision(self.dtype):
            product(block.hidden, cut.weight.T, out=tile)
        head = self.head
        if cut.bias is not None:
            tile += cut.bias
        if head.logit_scale != 1.0:
            tile *= head.logit_scale
        if head.softcap is not None:
            tile.div_(head.softcap).tanh_().mul_(head.softcap)
        if head.temperature != 1.0:
            tile /= head.temperature
        return tile

    def shifted_exp(self, tile: Tensor, shift: Tensor) -> Tensor:
        """`exp(tile - shift)` in a second buffer, with what would be near-subnormal lifted to a tiny number.

        Subnormal numbers cost ten times the time on a CPU (measured: 5 ns an element against 0.4), and 1e-26 of a
        probability is far below the rounding of the sum it goes into.
        """
        floor = -60.0 if self.acc_dtype == torch.float32 else -600.0
        out = self._scratch[: tile.numel()].view(tile.shape)
        return torch.sub(tile, shift[:, None], out=out).clamp_(min=floor).exp_()

    def dlogits(
        self, block: _Block, cut: _Slice, target: Tensor, peak: Tensor, total: Tensor, upstream: Tensor
    ) -> Tensor:
        """Gradient with respect to the product of the operands on one tile, where the `[rows]` upstream is given."""
        head = self.head
        z = self.logits(block, cut)
        dz = self.shifted_exp(z, peak).mul_(-(upstream / total)[:, None])
        column, inside = _targets_inside(cut, target)
        at_target = -torch.expm1(z.gather(1, column) - peak[:, None] - total.log()[:, None]) * upstream[:, None]
        dz.scatter_(1, column, torch.where(inside[:, None], at_target, dz.gather(1, column)))
        if head.softcap is not None:  # d tanh(u) = 1 - tanh(u)^2
            dz.mul_(z.mul_(head.temperature / head.softcap).square_().neg_().add_(1.0))
        factor = head.logit_scale / head.temperature
        if factor != 1.0:
            dz *= factor
        return dz


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _targets_inside(cut: _Slice, target: Tensor) -> tuple[Tensor, Tensor]:
    """Column of each row's target within the slice as an index [rows, 1], and whether it really lies there."""
    column = target - cut.start
    width = cut.stop - cut.start
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


def streaming_forward(
    hidden: Tensor, target: Tensor, rows: Tensor, head: LMHead, workspace_mib: int, *, want_stats: bool
) -> tuple[Tensor, Tensor, TokenStats | None]:
    """Log-prob and softmax state of every row; 0 where a row is not scored, NaN where its target is not below V.

    Args:
        hidden: [T, D] in the compute dtype.
        target: int64 [T].
        rows: int64 [R], the scored rows.
        head: the head; its tensors are used in the compute dtype.
        workspace_mib: see `KernelOptions`.
        want_stats: also fill a `TokenStats`.

    Returns:
        `logps` [T], the softmax's state [2, T] (the row's largest logit and the sum of exponentials above it), both in
        the accumulation dtype, and the stats. Two numbers instead of their log-sum-exp: beside an offset that all
        logits share, one number would lose the digits in which they differ.
    """
    tiles = _Tiles(hidden, rows, head, workspace_mib)
    V = head.weight.shape[0]
    lowest = torch.finfo(tiles.acc_dtype).min
    row_target = tiles.of_rows(target, -1)
    peak = hidden.new_full((tiles.padded_rows,), -torch.inf, dtype=tiles.acc_dtype)  # running maximum
    total = torch.zeros_like(peak)  # running sum of exp(z - peak)
    picked = torch.full_like(peak, torch.nan)
    z_mean, z_total = torch.zeros_like(peak), torch.zeros_like(peak)  # sum of z / V, running sum of exp(z - peak) * z

    for cut in tiles.slices():
        for block in tiles.blocks():
            span = block.span
            z = tiles.logits(block, cut)
            column, inside = _targets_inside(cut, row_target[span])
            picked[span] = torch.where(inside, z.gather(1, column).squeeze(1), picked[span])

            new_peak = torch.maximum(peak[span], z.amax(1)).clamp_(min=lowest)  # a slice of -inf alone stays finite
            rescale = (peak[span] - new_peak).exp_()
            weights = tiles.shifted_exp(z, new_peak)
            total[span] = total[span] * rescale + weights.sum(1)
            if want_stats:
                z_mean[span] += z.sum(1) / V
                weights.mul_(z.masked_fill_(z == -torch.inf, 0.0))
                z_total[span] = z_total[span] * rescale + weights.sum(1)
            peak[span] = new_peak

    log_total = total.log()
    stats = None
    if want_stats:
        entropy = log_total - (z_total / total - peak)
        stats = TokenStats(*map(tiles.to_rows, (entropy, z_mean, (picked >= peak).to(peak.dtype))))
    state = torch.stack((tiles.to_rows(peak), tiles.to_rows(total)))
    return tiles.to_rows(picked - peak - log_total), state, stats


def streaming_backward(
    dlogps: Tensor,
    hidden: Tensor,
    target: Tensor,
    rows: Tensor,
    state: Tensor,
    head: LMHead,
    workspace_mib: int,
    *,
    needs: tuple[bool, bool, bool, bool, bool],
) -> HeadGrads:
    """Exact gradients of `sum(dlogps * logps)`, only those asked for.

    `dz = dlogps * (onehot(target) - exp(z - peak) / total)`, through softcap, scale and temperature; then
    `dhidden = dz @ weight` and `dweight = dz.T @ hidden`. The target's `1 - p` is formed with expm1, so that it keeps
    its relative precision where p is close to 1.

    Args:
        dlogps: [T] upstream gradient, any strides.
        hidden, target, rows, head, workspace_mib: as in `streaming_forward`.
        state: [2, T] from the forward, peak and total.
        needs: which of hidden, weight, bias, lora a, lora b to compute.

    Numerics: for bf16 inputs the two products take dz in bf16 (as matrix units need it; relative error 2^-9 an entry,
        of the size of the rounding of the returned gradient); for fp16, fp32 and float64 inputs in fp32 or float64.
    """
    need_hidden, need_weight, need_bias, need_a, need_b = needs
    dlogps = dlogps.to(accumulation_dtype(hidden.dtype))
    if hidden.device.type == "cpu":  # elsewhere the search would be a synchronisation
        rows = rows[dlogps[rows] != 0]
    tiles = _Tiles(hidden, rows, head, workspace_mib)
    row_target = tiles.of_rows(target, -1)
    peak = tiles.of_rows(state[0], torch.inf)  # padded rows: exp(z - inf) is 0 whatever their logits
    total = tiles.of_rows(state[1], 1.0)
    upstream = tiles.of_rows(dlogps, 0.0)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=tiles.acc_dtype, device=hidden.device)

    # Columns of the widened gradients that are asked for; a's gradient goes through those of b, and so does hidden's.
    D, rank = tiles.D, tiles.rank
    hidden_columns = slice(0 if need_hidden else D, D + rank if need_hidden or need_a else D)
    weight_columns = slice(0 if need_weight else D, D + rank if need_b else D)
    dwide_hidden = zeros(tiles.padded_rows, hidden_columns.stop - hidden_columns.start)
    dwide_weight_buffer = zeros(tiles.width, weight_columns.stop - weight_columns.start)
    # Every row of these is written once, by its slice; without scored rows there are no slices.
    allocate = torch.empty_like if tiles.bounds else torch.zeros_like
    contiguous = torch.contiguous_format
    dweight = allocate(head.weight, memory_format=contiguous) if need_weight else None
    dbias = allocate(head.bias, memory_format=contiguous) if head.bias is not None and need_bias else None
    dlora_b = allocate(head.lora[1], memory_format=contiguous) if head.lora is not None and need_b else None

    for cut in tiles.slices():
        dwide_weight = dwide_weight_buffer[: cut.stop - cut.start].zero_()
        dbias_cut = zeros(cut.stop - cut.start)
        for block in tiles.blocks():
            span = block.span
            dz = tiles.dlogits(block, cut, row_target[span], peak[span], total[span], upstream[span])
            with matmul_precision(tiles.dtype):
                if dwide_hidden.shape[1]:
                    accumulate_product(dwide_hidden[span], dz, cut.weight[:, hidden_columns])
                if dwide_weight.shape[1]:
                    accumulate_product(dwide_weight, dz.T, block.hidden[:, weight_columns])
            if dbias is not None:
                dbias_cut += dz.sum(0)
        out = slice(cut.start, cut.stop)
        if dweight is not None:
            dweight[out] = dwide_weight[:, :D]
        if dlora_b is not None:
            dlora_b[out] = dwide_weight[:, -rank:]
        if dbias is not None:
            dbias[out] = dbias_cut

    through_b = dwide_hidden[:, dwide_hidden.shape[1] - rank :] if rank and (need_hidden or need_a) else None
    dlora_a = zeros(rank, D) if rank and need_a else None
    dhidden = torch.zeros_like(hidden, memory_format=contiguous) if need_hidden else None
    for block in tiles.blocks():  # a block at a time: nothing here is as large as the batch
        rows_of_block = rows[block.span]
        grad = dwide_hidden[block.span, :D]
        if through_b is not None and head.lora is not None:
            a, _, scale = head.lora
            dthrough_a = scale * through_b[block.span]
            with matmul_precision(tiles.acc_dtype):
                if dlora_a is not None:
                    dlora_a.addmm_(dthrough_a.T, block.hidden[:, :D].to(tiles.acc_dtype))
                if need_hidden:
                    grad.addmm_(dthrough_a, a.to(tiles.dtype).to(tiles.acc_dtype))
        if dhidden is not None:
            dhidden[rows_of_block] = grad[: rows_of_block.numel()].to(hidden.dtype)
    if dlora_a is not None and head.lora is not None:
        dlora_a = dlora_a.to(head.lora[0].dtype)
    return HeadGrads(dhidden, dweight, dbias, dlora_a, dlora_b)
