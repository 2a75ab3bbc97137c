"""The two factors of the product that gives the logits, and what happens to that product before it is a logit.

A low-rank adapter widens the factors: `hidden @ weight.T + scale * (hidden @ a.T) @ b.T` is one product of
`[hidden | scale * hidden @ a.T]` with `[weight | b]`, so everything built on them knows operands of K >= D + r columns
and nothing else; their gradients come out side by side in the same way.
"""

from functools import cached_property

import torch
from torch import Tensor

from fused_dpo.head import LMHead, VocabShard
from fused_dpo.linalg.matmul import accumulation_dtype, as_operand, matmul_precision
from fused_dpo.linalg.sizes import bounds_of_part, even_bounds, round_up

INNER_MULTIPLE = 64
"""Operands are padded with zero columns to a multiple of this: BLAS takes other inner loops for odd sizes and answers
with other bits, which would make a sequence's log-prob depend on the batch around it. Real heads need no padding."""


GATHERED_AT_ONCE = 512
"""Rows of the head that are gathered by index at a time."""


class Buffer:
    """Memory for tiles, allocated when it is first asked for and again only for larger ones."""

    def __init__(self) -> None:
        self._numbers: Tensor | None = None

    def like(self, tile: Tensor) -> Tensor:
        """Give uninitialised memory of the tile's shape, which the next call overwrites."""
        if self._numbers is None or self._numbers.numel() < tile.numel():
            self._numbers = tile.new_empty(tile.numel())
        return self._numbers[: tile.numel()].view(tile.shape)


class Operands:
    """Rows of both factors on demand, in the buffers of the caller.

    Attributes:
        dtype: what the values are rounded to, the compute dtype.
        held_dtype: what they are held in for products with fp32 results (see `fused_dpo.linalg.matmul.as_operand`).
        acc_dtype: fp32, or float64 for float64 inputs.
        width: K, columns of both factors.
        rank: of the adapter, 0 without one.
        V: rows of the head that are here.
        shard: where they lie in the vocabulary, if this is split over ranks.
    """

    def __init__(self, hidden: Tensor, rows: Tensor, head: LMHead, shard: VocabShard | None = None) -> None:
        self.hidden, self.rows, self.head, self.shard = hidden, rows, head, shard
        self.dtype = hidden.dtype
        self.acc_dtype = accumulation_dtype(hidden.dtype)
        self.held_dtype = as_operand(hidden[:0], self.dtype).dtype
        self.V, self.D = head.weight.shape
        self.rank = 0 if head.lora is None else head.lora[0].shape[0]
        self.width = round_up(self.D + self.rank, INNER_MULTIPLE)
        self._logits = Buffer()

    @property
    def vocabulary(self) -> int:
        """Rows of the head on all ranks."""
        return self.V if self.shard is None else self.shard.size

    def slice_bounds(self, width: int) -> list[tuple[int, int]]:
        """Split the head into nearly equal slices of at most `width` rows, and give their bounds here.

        The whole vocabulary is split, whatever part of it is here, so that ranks have the slices of one process.
        """
        bounds = even_bounds(self.vocabulary, width)
        return bounds if self.shard is None else bounds_of_part(bounds, self.shard.first, self.V)

    def buffer(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        """Allocate zeros [count, K] to read rows into; the padding columns stay zero."""
        return self.hidden.new_zeros(count, self.width, dtype=dtype or self.held_dtype)

    def read_hidden(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Read scored rows `start:stop` into the first rows of `out` [n, K], zeros into the rest; returns `out`."""
        D, count = self.D, stop - start
        out[:count, :D] = self.hidden.index_select(0, self.rows[start:stop])
        out[count:, :D] = 0.0
        return self.widen(out)

    def hidden_rows(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Read scored rows as `read_hidden` does, or give a view of them where they are the operand as they stand."""
        if self._start is None or out.shape[0] != stop - start:
            return self.read_hidden(start, stop, out)
        return self.hidden[self._start + start : self._start + stop]

    @cached_property
    def _start(self) -> int | None:
        """The first of the scored rows if products can take them from `hidden` itself: on a CPU, one after another.

        They are whole cache lines there, and have to begin with one: BLAS may take other loops for others.
        """
        hidden, rows = self.hidden, self.rows
        fits = self.head.lora is None and self.width == self.D and hidden.dtype == self.held_dtype
        if hidden.device.type != "cpu" or not fits or not hidden.is_contiguous() or hidden.data_ptr() % 64:
            return None
        run = torch.arange(rows.numel(), device="cpu")
        return int(rows[0]) if rows.numel() and torch.equal(rows - rows[0], run) else None

    def widen(self, out: Tensor) -> Tensor:
        """Fill the adapter's columns of hidden rows `out` [n, K] from their first D; returns `out`."""
        D = self.D
        if self.head.lora is not None:
            a, _, scale = self.head.lora
            wide_a = a.new_zeros(self.rank, self.width, dtype=self.acc_dtype)
            wide_a[:, :D] = a.to(self.dtype)
            out[:, D:] = 0.0  # what an earlier call left there must not meet the zeros of `wide_a` as NaN
            with matmul_precision(self.acc_dtype):
                through_a = scale * (out.to(self.acc_dtype) @ wide_a.T)
            out[:, D : D + self.rank] = through_a.to(self.dtype)
        return out

    def read_weight(self, which: slice | Tensor, out: Tensor) -> Tensor:
        """Read rows of the head, by slice or int64 index, into the first rows of `out` [n, K]; returns those rows."""
        if isinstance(which, Tensor):
            # By index in small pieces: gathered rows of ever other sizes would fragment the heap.
            for at in range(0, which.numel(), GATHERED_AT_ONCE):
                self._read_part(which[at : at + GATHERED_AT_ONCE], out[at:])
            return out[: which.numel()]
        return self._read_part(which, out)

    def _read_part(self, which: slice | Tensor, out: Tensor) -> Tensor:
        if isinstance(which, Tensor) and self.is_operand(out.dtype):
            return torch.index_select(self.head.weight, 0, which, out=out[: which.numel()])
        weight = _rows_of(self.head.weight, which).to(self.dtype)
        part = out[: weight.shape[0]]
        part[:, : self.D] = weight
        if self.head.lora is not None:
            part[:, self.D : self.D + self.rank] = _rows_of(self.head.lora[1], which).to(self.dtype)
        return part

    def is_operand(self, dtype: torch.dtype) -> bool:
        """Tell whether the head's weight is its own operand in that dtype, so that slices of it need no copy.

        A transposed one is not: BLAS takes other loops for it, in which a row's bits depend on its place.
        """
        weight = self.head.weight
        fits = self.head.lora is None and self.width == self.D and weight.is_contiguous()
        return fits and weight.dtype == dtype == self.dtype

    def weight_slice(self, which: slice, out: Tensor) -> Tensor:
        """Read rows of the head as `read_weight` does, or give the slice itself where the weight is its own operand."""
        return self.head.weight[which] if self.is_operand(out.dtype) else self.read_weight(which, out)

    def bias(self, which: slice | Tensor) -> Tensor | None:
        """Give the bias of those rows in the accumulation dtype; None if there is none."""
        return None if self.head.bias is None else self.head.bias[which].to(self.acc_dtype)

    def to_logits(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """Turn the product `z` of the operands into logits, in place."""
        head = self.head
        if bias is not None:
            z += bias
        if head.logit_scale != 1.0:
            z *= head.logit_scale
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        if head.temperature != 1.0:
            z /= head.temperature
        return z

    def logits_to_keep(self, z: Tensor) -> Tensor | None:
        """Copy logits that are about to be overwritten, if `through_logits` needs them; else None."""
        return None if self.head.softcap is None else self._logits.like(z).copy_(z)

    def through_logits(self, dz: Tensor, z: Tensor | None) -> Tensor:
        """Turn the gradient `dz` of the logits `z` into that of the product, in place; `z` is overwritten.

        Without a softcap `z` is not looked at.
        """
        head = self.head
        if head.softcap is not None and z is not None:  # d tanh(u) = 1 - tanh(u)^2
            dz.mul_(z.mul_(head.temperature / head.softcap).square_().neg_().add_(1.0))
        factor = head.logit_scale / head.temperature
        if factor != 1.0:
            dz *= factor
        return dz


def _rows_of(tensor: Tensor, which: slice | Tensor) -> Tensor:
    """Take `tensor[which]`; on a CPU `index_select` takes a quarter of the time that indexing does."""
    return tensor[which] if isinstance(which, slice) else tensor.index_select(0, which)
