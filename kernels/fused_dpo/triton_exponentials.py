"""Exponentials of the logits that the exact forward leaves for the backward, in memory that is needed there anyway.

The backward forms the logits again, one pass over the head of four. What would spare it that is as large as the logits;
but the weight's gradient is large too, and is written last: column v of the vocabulary is read for dz before row v of
the gradient is written. So the forward allocates the gradient, and its row v begins with the exponentials of column v,
for as many scored rows as fit: D, or 2·D where the hidden states are half as wide as the weight. dz of those rows takes
a read in place of a product; the other rows go the usual way.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_dpo.head import LMHead
from fused_dpo.linalg.sizes import ceil_div
from fused_dpo.triton_backward import DLogits
from fused_dpo.triton_configs import SPLIT_COLUMNS, TileConfig, epilogue_of, tile_config
from fused_dpo.triton_tile import OF_BATCH, WeightSlice, architecture, exp, launch

SIDE = 64
"""Rows, and columns, that a program turns from one order into the other: 128 bytes of half-precision numbers."""


class Exponentials(NamedTuple):
    """Of the first scored rows, as the forward's tiles have them; of none where no backward will come."""

    gradient: Tensor
    """The weight's gradient to be [V, D]: each row begins with the column's exponentials, in the hidden states' dtype.
    Empty if no rows are kept."""
    shifts: Tensor
    """fp32 [splits, tiles of a split, rows]: what was subtracted from the tile's logits."""

    @property
    def rows(self) -> int:
        """How many are kept."""
        return self.shifts.shape[2]

    @property
    def tile_columns(self) -> int:
        """Columns of one of the forward's tiles."""
        return SPLIT_COLUMNS // self.shifts.shape[1]

    @classmethod
    def empty(cls, hidden: Tensor, rows: Tensor, head: LMHead, *, hold: bool) -> "Exponentials":
        """Memory for as many of the scored rows as fit, in whole blocks; for none unless they are to be held."""
        config, (V, D) = forward_config(hidden, head), head.weight.shape
        fits = D * head.weight.element_size() // hidden.element_size() if hold else 0
        block = max(config.block_t, min(SIDE, config.block_v))
        kept = min(fits, rows.numel()) // block * block
        shifts = ceil_div(V, SPLIT_COLUMNS), SPLIT_COLUMNS // config.block_v, kept
        contiguous = torch.contiguous_format
        gradient = torch.empty_like(head.weight, memory_format=contiguous) if kept else head.weight.new_empty(0, D)
        return cls(gradient, torch.empty(shifts, dtype=torch.float32, device=hidden.device))

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """Of kernels that write or read them, for hidden states of `dtype`."""
        values = self.gradient.view(dtype)
        return {
            "exponentials_ptr": values,
            "shift_ptr": self.shifts,
            "kept_rows": self.rows,
            "stride_ev": values.stride(0),
        }


def forward_config(hidden: Tensor, head: LMHead) -> TileConfig:
    """The reviewed tile shape, never a tuned one: the same whether rows are kept or not."""
    return tile_config(architecture(hidden.device), hidden.dtype, epilogue_of(head))


@triton.jit(do_not_specialize=OF_BATCH)
def _dlogits_of_exponentials_kernel(
    exponentials_ptr,
    shift_ptr,
    target_ptr,
    state_ptr,
    upstream_ptr,
    dz_ptr,
    factor,
    first_v,
    width,
    V,
    stride_ev,
    stride_z,
    kept_rows,
    T,
    TILE_COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """dz of kept rows, as `_dlogits_kernel` computes it, from the forward's exponentials.

    Grid: row blocks x column blocks of the slice. Reads and writes kept_rows·width numbers; bound by memory.
    """
    blocks = kept_rows // SIDE
    pid_v = tl.program_id(0) // blocks
    offs_t = tl.program_id(0) % blocks * SIDE + tl.arange(0, SIDE)
    columns = pid_v * SIDE + tl.arange(0, SIDE)
    offs_v = first_v + columns
    mask_v = offs_v < V
    kept = exponentials_ptr + offs_v.to(tl.int64)[None, :] * stride_ev + offs_t[:, None]
    exponentials = tl.load(kept, mask=mask_v[None, :], other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + (first_v + pid_v * SIDE) // TILE_COLUMNS * kept_rows + offs_t)
    target = tl.load(target_ptr + offs_t)
    peak = tl.load(state_ptr + offs_t)
    total = tl.load(state_ptr + T + offs_t)
    surprise = tl.load(state_ptr + 2 * T + offs_t)
    upstream = tl.load(upstream_ptr + offs_t)
    hit = offs_v[None, :] == target[:, None]
    dz = tl.where(hit, surprise[:, None], exponentials * (exp(shift - peak) * (-1.0 / total))[:, None])
    dz = tl.where((upstream == 0.0)[:, None], 0.0, dz * (upstream * factor)[:, None])
    out = dz_ptr + offs_t.to(tl.int64)[:, None] * stride_z + columns[None, :]
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=(columns < width)[None, :])


class DLogitsOfExponentials:
    """`fused_dpo.triton_backward.FormDLogits` where the forward has left exponentials of the first rows."""

    def __init__(
        self,
        exponentials: Exponentials,
        hidden: Tensor,
        target: Tensor,
        state: Tensor,
        upstream: Tensor,
        head: LMHead,
        lora_h: Tensor | None,
    ) -> None:
        kept = exponentials.rows
        self._kept, self._side = kept, min(SIDE, exponentials.tile_columns)
        self._others = None
        if kept < hidden.shape[0]:
            inner = None if lora_h is None else lora_h[kept:]
            self._others = DLogits(hidden[kept:], target[kept:], state[:, kept:], upstream[kept:], head, inner)
        self._arguments: dict[str, Any] = {
            **exponentials.arguments(hidden.dtype),
            "target_ptr": target,
            "state_ptr": state.contiguous(),
            "upstream_ptr": upstream,
            "factor": head.logit_scale / head.temperature,
            "V": head.weight.shape[0],
            "T": hidden.shape[0],
            "TILE_COLUMNS": exponentials.tile_columns,
            "SIDE": self._side,
        }

    def __call__(self, dz: Tensor, weight: WeightSlice) -> None:
        """Fill `dz` [R, columns] for the columns from the slice's first on."""
        arguments = {"dz_ptr": dz, "first_v": weight.first, "width": dz.shape[1], "stride_z": dz.stride(0)}
        grid = self._kept // self._side * ceil_div(dz.shape[1], self._side)
        launch(_dlogits_of_exponentials_kernel, (grid,), dz, **self._arguments, **arguments)
        if self._others is not None:
            self._others(dz[self._kept :], weight)
