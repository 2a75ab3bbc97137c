"""Tiles of logits: slices of the head by blocks of the scored rows, the same in forward and backward."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fused_dpo.linalg.matmul import accumulation_dtype, as_operand, matmul_precision, product
from fused_dpo.linalg.operands import Operands
from fused_dpo.linalg.sizes import round_up

ROWS_PER_TILE = 1024
"""Scored rows per tile at most: enough to feed the matrix units, few enough that a tile stays in cache."""
TILE_ROW_MULTIPLE = 64
"""Fewest rows per tile; the last tile is padded to a multiple of this, or of what `row_multiple` finds."""


@lru_cache(maxsize=64)
def row_multiple(K: int, dtype: torch.dtype, tile_rows: int, threads: int) -> int:
    """Find the fewest rows whose product over K dimensions has the same bits as in a tile of `tile_rows`, on this CPU.

    BLAS takes other inner loops for fewer rows and answers with other bits, which would make a sequence's log-prob
    depend on the batch around it. Below 8 rows it always does; where the limit lies beyond that depends on the release,
    the processor and K, so it is found by trying (bf16, K from 448 to 768: 128 with torch 2.11, fewer with 2.13). As
    it may depend on the threads as well, they are an argument.
    """
    rng = torch.Generator("cpu").manual_seed(0)
    random = (torch.randn(n, K, generator=rng, dtype=torch.float32, device="cpu") for n in (tile_rows, 64))
    hidden, weight = (as_operand(numbers, dtype) for numbers in random)
    with matmul_precision(dtype):
        full = hidden @ weight.T
        multiple = TILE_ROW_MULTIPLE
        while multiple < tile_rows:
            counts = range(multiple, tile_rows, multiple)
            if all(torch.equal(hidden[:count] @ weight.T, full[:count]) for count in counts):
                break
            multiple *= 2
    return min(multiple, tile_rows)


class _Slice(NamedTuple):
    """Rows `start:stop` of the head."""

    start: int
    stop: int
    weight: Tensor
    """Operand [columns, K]."""
    bias: Tensor | None

    def targets(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Find the column of each row's target within the slice, and whether it lies there at all, both [rows, 1]."""
        column = (target - self.start)[:, None]
        width = self.stop - self.start
        return column.clamp(0, width - 1), (column >= 0) & (column < width)


class _Block(NamedTuple):
    """Rows `span` of the padded scored rows."""

    span: slice
    hidden: Tensor
    """Operand [rows, K]."""


def rows_per_tile(K: int, workspace_mib: int, dtype: torch.dtype) -> int:
    """Choose the rows of a block: ROWS_PER_TILE, halved until they fit into a quarter of the workspace."""
    rows = ROWS_PER_TILE
    while rows > TILE_ROW_MULTIPLE and 2 * rows * K * accumulation_dtype(dtype).itemsize > workspace_mib * 2**18:
        rows //= 2
    return rows


def slice_width(K: int, workspace_mib: int, dtype: torch.dtype, device: torch.device) -> int:
    """Choose how many columns a slice of the vocabulary has at most, by K, dtype and workspace alone.

    Per column a slice holds K numbers of weight (and those once more while they are converted), K of its gradient, and
    two tiles of logits; beside it stands one block of hidden states (and that once more while it is gathered).
    """
    itemsize, rows = accumulation_dtype(dtype).itemsize, rows_per_tile(K, workspace_mib, dtype)
    block_bytes = 2 * rows * K * itemsize
    column_bytes = (2 * K + 2 * rows) * itemsize + K * dtype.itemsize
    fits = max((workspace_mib * 2**20 - block_bytes) // column_bytes, 16)
    return min(fits, widest_tile(device))


class Tiles:
    """Tiles of logits of the scored rows, recomputed alike in forward and backward.

    Scored rows are padded, and so is every per-row state: padded rows compute along and are cut off at the end.
    """

    def __init__(self, operands: Operands, workspace_mib: int) -> None:
        self.operands, self.rows = operands, operands.rows
        device, R, multiple = operands.hidden.device, operands.rows.numel(), TILE_ROW_MULTIPLE
        self._rows_per_tile = rows_per_tile(operands.width, workspace_mib, operands.dtype)
        if device.type == "cpu":
            multiple = row_multiple(operands.width, operands.dtype, self._rows_per_tile, torch.get_num_threads())
        self.padded_rows = round_up(R, multiple)
        bounds = operands.slice_bounds(slice_width(operands.width, workspace_mib, operands.dtype, device))
        self.bounds = bounds if R else []
        self.width = max(stop - start for start, stop in bounds)
        tile_rows = min(self._rows_per_tile, self.padded_rows)
        self._weight = operands.buffer(self.width if R else 0)
        self._block = operands.buffer(tile_rows)
        self._logits = torch.empty(tile_rows * self.width, dtype=operands.acc_dtype, device=device)

    def of_rows(self, values: Tensor, fill: float) -> Tensor:
        """Take the values of the scored rows out of those of all rows, padded with `fill`."""
        state = values.new_full((self.padded_rows,), fill)
        state[: self.rows.numel()] = values[self.rows]
        return state

    def to_rows(self, state: Tensor) -> Tensor:
        """Put values of the scored rows back among all rows, with 0 where a row is not scored."""
        T = self.operands.hidden.shape[0]
        return state.new_zeros(T).index_copy_(0, self.rows, state[: self.rows.numel()])

    def slices(self) -> Iterator[_Slice]:
        """Walk the head, a slice at a time, converted once into a buffer that the next slice overwrites."""
        for start, stop in self.bounds:
            which = slice(start, stop)
            yield _Slice(start, stop, self.operands.read_weight(which, self._weight), self.operands.bias(which))

    def blocks(self) -> Iterator[_Block]:
        """Walk the scored rows, a block at a time; the next block may overwrite it."""
        for start in range(0, self.padded_rows, self._rows_per_tile):
            stop = min(start + self._rows_per_tile, self.padded_rows)
            buffer = self._block[: stop - start]
            yield _Block(slice(start, stop), self.operands.hidden_rows(start, min(stop, self.rows.numel()), buffer))

    def logits(self, block: _Block, cut: _Slice) -> Tensor:
        """Compute one tile `[rows, columns]`, in a buffer that the next call overwrites."""
        shape = block.hidden.shape[0], cut.stop - cut.start
        tile = self._logits[: shape[0] * shape[1]].view(shape)
        with matmul_precision(self.operands.dtype):
            product(block.hidden, cut.weight.T, out=tile)
        return self.operands.to_logits(tile, cut.bias)


def widest_tile(device: torch.device) -> int:
    """Tell how many columns a tile has at most: it has to stay in a CPU's cache, and to fill any other device."""
    return 2048 if device.type == "cpu" else 32768
