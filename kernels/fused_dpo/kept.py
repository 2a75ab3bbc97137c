"""Products of a block of rows with the columns that it keeps."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_dpo.operands import Operands, round_up
from fused_dpo.precision import matmul_precision, product
from fused_dpo.screen import BLOCK_ROWS

ROW_MULTIPLE, COLUMN_MULTIPLE = 64, 512
"""Kept products are padded to these: every new shape costs oneDNN 0.6 ms to compile, and memory that it keeps: with
multiples of 32 and 128 the 450 MiB of a whole forward and backward, measured, were 110 MiB more."""
COLUMNS_AT_ONCE = 4096
"""Kept columns multiplied at a time, at most."""


class Kept:
    """Products of one block of rows with the columns it keeps, a chunk at a time."""

    def __init__(self, operands: Operands, workspace_mib: int) -> None:
        self.operands = operands
        column_bytes = (2 * operands.width + 3 * BLOCK_ROWS) * operands.acc_dtype.itemsize
        width = min(workspace_mib * 2**18 // column_bytes, COLUMNS_AT_ONCE, round_up(operands.V, COLUMN_MULTIPLE))
        # Where that is less than a multiple, all products have the same width.
        self.multiple = min(COLUMN_MULTIPLE, max(width // 64, 1) * 64)
        self.width = max(width // self.multiple, 1) * self.multiple
        self.weight_buffer = operands.buffer(self.width)
        self._hidden = operands.buffer(BLOCK_ROWS)
        self._logits = operands.hidden.new_empty(BLOCK_ROWS * self.width, dtype=operands.acc_dtype)
        self._scratch = torch.empty_like(self._logits)
        # For gradients alone, so that a forward does not hold them.
        self._padded: Tensor | None = None
        self._product: Tensor | None = None

    def hidden(self, start: int, stop: int) -> Tensor:
        """Operand of the scored rows `start:stop`, padded with zero rows; overwritten by the next block."""
        return self.operands.read_hidden(start, stop, self._hidden[: round_up(stop - start, ROW_MULTIPLE)])

    def columns(self, keep: Tensor, first: int) -> Iterator[slice | Tensor]:
        """The kept columns in chunks: slices where all are kept, else indices. `keep` bool [n] begins at `first`."""
        if bool(keep.all()):
            stop = first + keep.numel()
            yield from (slice(at, min(at + self.width, stop)) for at in range(first, stop, self.width))
        else:
            index = keep.nonzero().squeeze(1) + first
            if index.numel():
                yield from index.split(self.width)

    def weight(self, columns: slice | Tensor) -> Tensor:
        """Operand of a chunk, padded with zero rows; overwritten by the next call."""
        count = self.operands.read_weight(columns, self.weight_buffer).shape[0]
        padded = self.weight_buffer[: round_up(count, self.multiple)]
        padded[count:] = 0.0
        return padded

    def logits(self, hidden: Tensor, weight: Tensor, columns: slice | Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Logits `[rows, columns]` of the real rows and columns, and a scratch buffer of that shape.

        Both are overwritten by the next call.
        """
        shape = hidden.shape[0], weight.shape[0]
        tile = self._logits[: shape[0] * shape[1]].view(shape)
        with matmul_precision(self.operands.dtype):
            product(hidden, weight.T, out=tile)
        count = columns.stop - columns.start if isinstance(columns, slice) else columns.numel()
        z = self.operands.to_logits(tile[:rows, :count], self.operands.bias(columns))
        return z, self._scratch[: shape[0] * shape[1]].view(shape)[:rows, :count]

    def pad(self, dz: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        """`dz` with zeros to the size of the padded operands; overwritten by the next call."""
        if self._padded is None:
            self._padded = torch.empty_like(self._logits)
        shape = hidden.shape[0], weight.shape[0]
        padded = self._padded[: shape[0] * shape[1]].view(shape).zero_()
        padded[: dz.shape[0], : dz.shape[1]] = dz
        return padded

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b` in the accumulation dtype, for at most `width` rows or a block; overwritten by the next call."""
        if self._product is None:
            rows = max(self.width, BLOCK_ROWS)
            self._product = torch.empty(rows * self.operands.width, dtype=a.dtype, device=a.device)
        out = self._product[: a.shape[0] * b.shape[1]].view(a.shape[0], b.shape[1])
        with matmul_precision(self.operands.dtype):
            return product(a, b, out=out)


def targets_among(columns: slice | Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each row's target [n] within the chunk [n, 1], and whether it really is there [n, 1]."""
    if isinstance(columns, slice):
        place, count = target - columns.start, columns.stop - columns.start
        return place.clamp(0, count - 1)[:, None], ((place >= 0) & (place < count))[:, None]
    place = torch.searchsorted(columns, target).clamp_(max=columns.numel() - 1)
    return place[:, None], (columns[place] == target)[:, None]
