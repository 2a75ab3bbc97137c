"""Products of a block of rows with the columns that it keeps."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_dpo.linalg.matmul import matmul_precision, multiplied_in_bf16, product
from fused_dpo.linalg.operands import Operands
from fused_dpo.linalg.sizes import round_up
from fused_dpo.streaming.screener import BLOCK_ROWS

KEPT_MULTIPLES, KEPT_MULTIPLES_IN_BF16 = (16, 64), (64, 512)
"""Rows and columns that kept products are padded to multiples of. On a CPU's bf16 units every new shape costs oneDNN
0.6 ms to compile, and memory that it keeps: with multiples of 32 and 128 the 450 MiB of a whole forward and backward,
measured, were 110 MiB more. Elsewhere a shape costs nothing, and this padding 0.7 times the work of short sequences."""
COLUMNS_AT_ONCE = 4096
"""Kept columns multiplied at a time, at most."""


class KeptProducts:
    """Products of one block of rows with the columns it keeps, a chunk at a time."""

    def __init__(self, operands: Operands, workspace_mib: int) -> None:
        self.operands = operands
        in_bf16 = operands.hidden.device.type == "cpu" and multiplied_in_bf16(operands.dtype)
        self._row_multiple, multiple = KEPT_MULTIPLES_IN_BF16 if in_bf16 else KEPT_MULTIPLES
        column_bytes = (2 * operands.width + 2 * BLOCK_ROWS) * operands.acc_dtype.itemsize
        width = min(workspace_mib * 2**18 // column_bytes, COLUMNS_AT_ONCE, round_up(operands.vocabulary, multiple))
        # Where that is less than a multiple, all products have the same width.
        self.multiple = min(multiple, max(width // 64, 1) * 64)
        self.width = max(width // self.multiple, 1) * self.multiple
        self.weight_buffer = operands.buffer(self.width)
        self._hidden = operands.buffer(BLOCK_ROWS)
        self._logits = operands.hidden.new_empty(BLOCK_ROWS * self.width, dtype=operands.acc_dtype)
        self._product: Tensor | None = None  # for gradients alone, so that a forward does not hold it

    def hidden(self, start: int, stop: int) -> Tensor:
        """Read the scored rows `start:stop` as operand, padded with zero rows; overwritten by the next block."""
        return self.operands.read_hidden(start, stop, self._hidden[: round_up(stop - start, self._row_multiple)])

    def columns(self, keep: Tensor, first: int) -> Iterator[slice | Tensor]:
        """Walk the kept columns in chunks: slices if all are kept, else indices. `keep` bool [n] begins at `first`."""
        if bool(keep.all()):
            stop = first + keep.numel()
            yield from (slice(at, min(at + self.width, stop)) for at in range(first, stop, self.width))
        else:
            index = keep.nonzero().squeeze(1) + first
            if index.numel():
                yield from index.split(self.width)

    def weight(self, columns: slice | Tensor) -> Tensor:
        """Read the weight of a chunk as operand, padded with zero rows; overwritten by the next call."""
        count = self.operands.read_weight(columns, self.weight_buffer).shape[0]
        padded = self.weight_buffer[: round_up(count, self.multiple)]
        padded[count:] = 0.0
        return padded

    def logits(self, hidden: Tensor, weight: Tensor, columns: slice | Tensor, rows: int) -> Tensor:
        """Compute logits `[rows, columns]` of the real rows and columns, overwritten by the next call."""
        tile = self._tile(hidden, weight)
        with matmul_precision(self.operands.dtype):
            product(hidden, weight.T, out=tile)
        count = columns.stop - columns.start if isinstance(columns, slice) else columns.numel()
        return self.operands.to_logits(tile[:rows, :count], self.operands.bias(columns))

    def pad(self, dz: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        """Put zeros around `dz`, which is in the place of the last logits, to the size of the padded operands."""
        tile = self._tile(hidden, weight)
        tile[dz.shape[0] :] = 0.0
        tile[:, dz.shape[1] :] = 0.0
        return tile

    def _tile(self, hidden: Tensor, weight: Tensor) -> Tensor:
        shape = hidden.shape[0], weight.shape[0]
        return self._logits[: shape[0] * shape[1]].view(shape)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply `a @ b` in the accumulation dtype, at most `width` rows or a block; overwritten by the next call."""
        if self._product is None:
            rows = max(self.width, BLOCK_ROWS)
            self._product = torch.empty(rows * self.operands.width, dtype=a.dtype, device=a.device)
        out = self._product[: a.shape[0] * b.shape[1]].view(a.shape[0], b.shape[1])
        with matmul_precision(self.operands.dtype):
            return product(a, b, out=out)


def targets_among(columns: slice | Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Find the place of each row's target [n] within the chunk, [n, 1], and whether it is there at all, [n, 1]."""
    if isinstance(columns, slice):
        place, count = target - columns.start, columns.stop - columns.start
        return place.clamp(0, count - 1)[:, None], ((place >= 0) & (place < count))[:, None]
    place = torch.searchsorted(columns, target).clamp_(max=columns.numel() - 1)
    return place[:, None], (columns[place] == target)[:, None]
