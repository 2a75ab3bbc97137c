"""Which columns of the vocabulary matter to which rows: seen in the forward, judged in the backward.

A screen is a map `uint8 [blocks, V]`: for each block of scored rows and each column the (biased, as in fp32) exponent
of the largest probability that any of the rows gives it, or EVERYTHING throughout a block that is to be computed
exactly. Exponents instead of bits, so that the backward can choose the threshold by what it knows then, the upstream
gradient, without a second look at the logits.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fused_dpo.head import LMHead
from fused_dpo.operands import Operands, even_bounds, round_up
from fused_dpo.precision import accumulation_dtype, has_bf16_units, matmul_precision, product

BLOCK_ROWS = 128
"""Scored rows that share their kept columns: fewer keep fewer columns, more feed the matrix units better."""
ROWS_AT_ONCE = 512
"""Rows screened at a time, at most."""
ROW_MULTIPLE = 32
"""Blocks are multiplied in multiples of this, and cut down to one where the vocabulary is too large for more."""
EVERYTHING = 255
"""The exponent of a column that no threshold drops."""
BIAS = 127
"""Exponent e stands for probabilities in [2^(e-BIAS), 2^(e-BIAS+1))."""


def block_count(rows: int, sequences: int, block_rows: int) -> int:
    """Blocks that `rows` rows in `sequences` sequences make at most, if no block straddles two sequences."""
    return -(-rows // block_rows) + sequences


def block_spans(rows: Tensor, offsets: Tensor, block_rows: int) -> list[tuple[int, int]]:
    """Spans of the scored rows, each within one sequence.

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


def exponents(largest: Tensor) -> Tensor:
    """Screen of columns [V] whose largest probabilities are given; NaN is kept by every threshold."""
    return (largest.float().view(torch.int32) >> 23).to(torch.uint8)


def judge(
    levels: Tensor, block_of_row: Tensor, upstream: Tensor, surprise: Tensor, target: Tensor, eps: float
) -> Tensor:
    """Columns that each block keeps, bool [blocks, V].

    With G the largest |upstream| in a block, s the root mean square of its rows' surprise, and S that of
    |upstream| * surprise over all rows, columns are dropped whose probability is for sure, that is by the upper end of
    its exponent, at most `eps * max(s, S / G)` in every row of the block. Targets are kept, unless
    `|upstream| * surprise <= eps * S`. Of more than half of the columns all are kept: gathering them would cost more.

    Args:
        levels: uint8 [blocks, V], the screen.
        block_of_row: int64 [R].
        upstream, surprise: [R], the latter 1 - p of the target: the size of the row's gradient is about their product.
            Where they are not finite nothing is dropped.
        target: int64 [R], V where there is none.
        eps: the filter's threshold.
    """
    blocks, V = levels.shape
    magnitude, size = upstream.abs(), (upstream * surprise).abs()
    zeros = magnitude.new_zeros(blocks)
    largest = zeros.scatter_reduce(0, block_of_row, magnitude, "amax")
    rows = zeros.index_add(0, block_of_row, torch.ones_like(magnitude)).clamp(min=1.0)
    own = (zeros.index_add(0, block_of_row, surprise.square()) / rows).sqrt()
    scale = size.square().mean().sqrt() if size.numel() else zeros.sum()
    scale = torch.where(scale.isfinite(), scale, torch.nan)  # and NaN is below no limit
    threshold = eps * torch.maximum(own, scale / largest)
    limit = (threshold.log2() + (BIAS - 1)).floor().clamp(min=-1, max=BIAS)
    limit = torch.where(largest <= eps * scale, torch.full_like(limit, EVERYTHING), limit)
    keep = levels > limit.nan_to_num(nan=-1.0).to(torch.int16)[:, None]
    judged = (size > eps * scale) & (target < V)
    keep[block_of_row[judged], target[judged]] = True
    return keep | (keep.sum(1, keepdim=True) > V // 2)


def screens_coarsely(hidden: Tensor, head: LMHead) -> bool:
    """Whether the screen's logits are rounded to bf16: where that is faster, and where nothing is added to them."""
    return (
        hidden.dtype == torch.bfloat16
        and hidden.device.type == "cpu"
        and has_bf16_units(hidden.device)
        and head.bias is None  # where a bias cancels the rounded product, what is left is its rounding
    )


def rows_screened(hidden: Tensor, head: LMHead, workspace_mib: int) -> int:
    """Rows whose logits and probabilities over the whole vocabulary fit into half of the workspace, at most 512."""
    dtype = hidden.dtype if screens_coarsely(hidden, head) else accumulation_dtype(hidden.dtype)
    fits = workspace_mib * 2**19 // (2 * head.weight.shape[0] * dtype.itemsize) // ROW_MULTIPLE * ROW_MULTIPLE
    return min(max(fits, ROW_MULTIPLE), ROWS_AT_ONCE)


def screen_blocks(hidden: Tensor, head: LMHead, rows: int, sequences: int, workspace_mib: int) -> int:
    """Blocks in the screen of `fused_dpo.filtered`, for `rows` rows at most."""
    return block_count(rows, sequences, min(rows_screened(hidden, head, workspace_mib), BLOCK_ROWS))


class Screener:
    """Logits and probabilities of a group of rows over the whole vocabulary, good enough to choose columns by."""

    def __init__(self, operands: Operands, workspace_mib: int) -> None:
        self.operands = operands
        head, width = operands.head, operands.width
        self.coarse = screens_coarsely(operands.hidden, head)
        self.rows = rows_screened(operands.hidden, head, workspace_mib)
        held = operands.dtype if self.coarse else operands.held_dtype
        self._hidden = operands.buffer(round_up(self.rows, 64), held)
        if head.weight.dtype == held and head.weight.shape[1] == width:  # the weight is its own operand
            self._weight, self._bounds = None, [(0, operands.V)]
        else:
            column_bytes = width * (operands.dtype.itemsize + held.itemsize)
            self._bounds = even_bounds(operands.V, max(workspace_mib * 2**18 // column_bytes, 16))
            self._weight = operands.buffer(max(stop - start for start, stop in self._bounds), held)
        dtype = operands.dtype if self.coarse else operands.acc_dtype
        self._logits = torch.empty(self._hidden.shape[0], operands.V, dtype=dtype, device=self._hidden.device)
        self._probabilities = torch.empty_like(self._logits)

    def groups(self, spans: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Consecutive blocks, as many as are screened at once."""
        group: list[tuple[int, int]] = []
        for span in spans:
            if group and span[1] - group[0][0] > self.rows:
                yield group
                group = []
            group.append(span)
        if group:
            yield group

    def look(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Logits and probabilities [stop - start, V] of scored rows, overwritten by the next call."""
        operands = self.operands
        rows = round_up(stop - start, 64)  # a row's bits must not depend on how many there are
        hidden, z = operands.read_hidden(start, stop, self._hidden[:rows]), self._logits[:rows]
        for first, last in self._bounds:
            columns = slice(first, last)
            weight = operands.head.weight
            if self._weight is not None:
                weight = operands.read_weight(columns, self._weight)
            part = z[:, columns]
            if self.coarse:
                torch.mm(hidden, weight.T, out=part)
            else:
                with matmul_precision(operands.dtype):
                    product(hidden, weight.T, out=part)
            operands.to_logits(part, operands.bias(columns))
        probabilities = torch.softmax(z, 1, out=self._probabilities[:rows])
        return z[: stop - start], probabilities[: stop - start]


def largest_of(probabilities: Tensor) -> Tensor:
    """Largest of each column, in the dtype of the probabilities; NaN counts as large."""
    if probabilities.dtype != torch.bfloat16:
        return probabilities.amax(0)
    # Numbers that are not negative order like their bits, and integers are compared three times as fast.
    return probabilities.view(torch.int16).amax(0).view(torch.bfloat16)
