"""The screen in plain torch: how large a probability each column reaches in each block of rows."""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fused_dpo.hardware import has_bf16_units
from fused_dpo.head import LMHead, VocabShard
from fused_dpo.linalg.matmul import accumulation_dtype, matmul_precision, product
from fused_dpo.linalg.operands import Buffer, Operands
from fused_dpo.linalg.sizes import ceil_div, round_up
from fused_dpo.streaming.online_softmax import lowest_exponent
from fused_dpo.streaming.tiles import widest_tile

BLOCK_ROWS = 128
"""Scored rows that share their kept columns: fewer keep fewer columns, more feed the matrix units better."""
SCREENED_ROWS, SCREENED_ROWS_COARSELY = 512, 256
"""Rows screened at a time, at most."""
SCREEN_ROW_MULTIPLE = 32
"""Rows are screened in multiples of this, so that a row's bits do not depend on how many there are."""


def block_spans(rows: Tensor, offsets: Tensor, block_rows: int) -> list[tuple[int, int]]:
    """Split the scored rows into spans, each within one sequence.

    Args:
        rows: int64 [R], ascending.
        offsets: int64 [N+1] of the sequences.
        block_rows: rows of a block at most.
    """
    bounds = torch.searchsorted(rows, offsets.contiguous()).tolist()
    return [
        (start, min(start + block_rows, stop))
        for first, stop in pairwise(bounds)
        for start in range(first, stop, block_rows)
    ]


def exponents(probabilities: Tensor) -> Tensor:
    """Take the biased exponents of probabilities [V]; NaN has the one that every threshold keeps."""
    return (probabilities.float().view(torch.int32) >> 23).to(torch.uint8)


def screens_coarsely(hidden: Tensor, head: LMHead, shard: VocabShard | None = None) -> bool:
    """Tell whether the screen's logits are rounded to bf16: where that is faster, and the product is the logits."""
    return (
        hidden.dtype == torch.bfloat16
        and shard is None  # whose parts would have to agree on what is rounded
        and hidden.device.type == "cpu"
        and has_bf16_units(hidden.device)
        and head.bias is None  # where a bias cancels the rounded product, what is left is its rounding
        and head.logit_scale == head.temperature == 1.0  # and each step to the logits would round once more
        and head.softcap is None
    )


def rows_screened(hidden: Tensor, head: LMHead, workspace_mib: int, shard: VocabShard | None = None) -> int:
    """Count the rows whose screen over the whole vocabulary fits into the workspace: 32 to 512, or 256 if coarse.

    A coarse one has logits and probabilities, in half of the workspace. Any other has them one after the other in the
    same memory, three quarters of it, as it needs no buffers for kept columns. The same on all ranks.
    """
    V, most = head.weight.shape[0] if shard is None else shard.most, SCREENED_ROWS
    fits = workspace_mib * 3 * 2**18 // (accumulation_dtype(hidden.dtype).itemsize * V)
    if screens_coarsely(hidden, head, shard):
        most, fits = SCREENED_ROWS_COARSELY, workspace_mib * 2**19 // (2 * hidden.dtype.itemsize * V)
    fits = fits // SCREEN_ROW_MULTIPLE * SCREEN_ROW_MULTIPLE
    return min(max(fits, SCREEN_ROW_MULTIPLE), most)


def screen_shape(
    hidden: Tensor, head: LMHead, rows: int, sequences: int, workspace_mib: int, shard: VocabShard | None = None
) -> tuple[int, int, int]:
    """Tell the shape of the screen for at most `rows` rows in so many sequences: no block straddles two of them."""
    block_rows = min(rows_screened(hidden, head, workspace_mib, shard), BLOCK_ROWS)
    return ceil_div(rows, block_rows) + sequences, 2, head.weight.shape[0]


class Screener:
    """Logits, and then probabilities, of a group of rows over the whole vocabulary.

    A coarse screen is good enough to choose columns by (`look`). Any other has the logits themselves (`tiles`), for an
    online softmax that leaves its exponentials in their place, and turns those into `probabilities`.
    """

    def __init__(self, operands: Operands, workspace_mib: int) -> None:
        self.operands = operands
        head, width, device = operands.head, operands.width, operands.hidden.device
        self.coarse = screens_coarsely(operands.hidden, head, operands.shard)
        self.rows = rows_screened(operands.hidden, head, workspace_mib, operands.shard)
        held, dtype = (operands.dtype,) * 2 if self.coarse else (operands.held_dtype, operands.acc_dtype)
        self._hidden = operands.buffer(self.rows, held)
        widest = operands.V if self.coarse else widest_tile(device)
        own = operands.is_operand(held)
        if not own:
            widest = min(widest, max(workspace_mib * 2**18 // (width * (operands.dtype.itemsize + held.itemsize)), 16))
        self.bounds = operands.slice_bounds(widest)
        self._weight = operands.buffer(0 if own else max(stop - start for start, stop in self.bounds), held)
        self._logits = torch.empty(self.rows, operands.V, dtype=dtype, device=device)
        self._probabilities = Buffer()

    def groups(self, spans: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Walk the blocks in groups of consecutive ones, as many as are screened at once."""
        group: list[tuple[int, int]] = []
        for span in spans:
            if group and span[1] - group[0][0] > self.rows:
                yield group
                group = []
            group.append(span)
        if group:
            yield group

    def look(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Compute coarse logits and probabilities [stop - start, V] of scored rows, overwritten by the next call."""
        for _ in self._products(start, stop):
            pass
        z = self._logits[: round_up(stop - start, SCREEN_ROW_MULTIPLE)]
        probabilities = torch.softmax(z, 1, out=self._probabilities.like(z))
        return z[: stop - start], probabilities[: stop - start]

    def tiles(self, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk columns and their logits [stop - start, columns] of scored rows, overwritten by the next call."""
        for columns, z in self._products(start, stop):
            yield columns, z[: stop - start]

    def probabilities(self, peaks: list[Tensor], peak: Tensor, total: Tensor) -> Tensor:
        """Turn the tiles of the last call of `tiles` into probabilities [rows, V]; each is now `exp(logit - peak)`.

        `peaks` [rows] of each tile are those then subtracted; `total` [rows] is the sum of `exp(logit - peak)`.
        What the softmax lifted to its tiny number is 0 here, and so is a tile that is all below it.
        """
        lifted = math.exp(lowest_exponent(total.dtype))
        for (first, last), of_tile in zip(self.bounds, peaks, strict=True):
            unit = (of_tile - peak).exp_() / total
            exponentials = torch.threshold_(self._logits[: len(total), first:last], 2 * lifted, 0.0)
            exponentials.mul_(unit.masked_fill_(unit < lifted, 0.0)[:, None])
        return self._logits[: len(total)]

    def _products(self, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """Walk columns and their logits of scored rows, padded."""
        operands = self.operands
        rows = round_up(stop - start, SCREEN_ROW_MULTIPLE)
        hidden = operands.read_hidden(start, stop, self._hidden[:rows])
        for first, last in self.bounds:
            columns = slice(first, last)
            weight, z = operands.weight_slice(columns, self._weight), self._logits[:rows, columns]
            if self.coarse:
                torch.mm(hidden, weight.T, out=z)
            else:
                with matmul_precision(operands.dtype):
                    product(hidden, weight.T, out=z)
            yield columns, operands.to_logits(z, operands.bias(columns))


def largest_of(probabilities: Tensor) -> Tensor:
    """Take the largest of each column, in the dtype of the probabilities. Blocks with NaN are left to the guard."""
    if probabilities.dtype != torch.bfloat16:
        return probabilities.amax(0)
    # Numbers that are not negative order like their bits, and integers are compared three times as fast.
    return probabilities.view(torch.int16).amax(0).view(torch.bfloat16)
