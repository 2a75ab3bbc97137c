"""Exponentials of the logits that the exact forward leaves for the backward, in memory that is needed there anyway.

The backward needs the logits a second time, and forms them again: one of four passes over the head. Saved, they would
take R·V numbers. But the weight's gradient takes V·D numbers anyway, and nothing is written to its row v before dz of
column v has been formed. So the forward allocates the gradient already, and saves exponentials of column v in row v, of
as many scored rows as fit there: D, or 2·D where a number of the gradient has twice the bytes of a hidden state. dz of
these rows takes a read instead of a product. The other rows go the usual way.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_dpo.gpu.configs import SPLIT_COLUMNS, TileConfig, epilogue_of, tile_config
from fused_dpo.gpu.launch import architecture
from fused_dpo.head import HeadInputs, LMHead
from fused_dpo.linalg.sizes import ceil_div

SIDE = 64
"""Rows, and columns, that a program turns from one order into the other: 128 bytes of half-precision numbers."""


class Exponentials(NamedTuple):
    """Exponentials of the first scored rows, as the forward's tiles have them; of none where no backward will come."""

    gradient: Tensor
    """The weight's gradient to be [V, D]: each row begins with the column's exponentials, in the hidden states' dtype.
    Empty if no rows are saved."""
    shifts: Tensor
    """fp32 [splits, tiles of a split, rows]: what was subtracted from the tile's logits."""

    @property
    def rows(self) -> int:
        """How many are saved."""
        return self.shifts.shape[2]

    @property
    def tile_columns(self) -> int:
        """Columns of one of the forward's tiles."""
        return SPLIT_COLUMNS // self.shifts.shape[1]

    @classmethod
    def empty(cls, inputs: HeadInputs, *, save: bool) -> "Exponentials":
        """Allocate room for as many scored rows as fit, in whole blocks; for none unless they are to be saved."""
        hidden, rows, head = inputs.hidden, inputs.rows, inputs.head
        config, (V, D) = forward_config(hidden, head), head.weight.shape
        fits = D * head.weight.element_size() // hidden.element_size() if save else 0
        block = max(config.block_t, min(SIDE, config.block_v))
        saved = min(fits, rows.numel()) // block * block
        shifts = ceil_div(V, SPLIT_COLUMNS), SPLIT_COLUMNS // config.block_v, saved
        contiguous = torch.contiguous_format
        gradient = torch.empty_like(head.weight, memory_format=contiguous) if saved else head.weight.new_empty(0, D)
        return cls(gradient, torch.empty(shifts, dtype=torch.float32, device=hidden.device))

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """Give the arguments of kernels that write or read the exponentials, for hidden states of `dtype`."""
        values = self.gradient.view(dtype)
        return {
            "exponentials_ptr": values,
            "shift_ptr": self.shifts,
            "saved_rows": self.rows,
            "stride_ev": values.stride(0),
        }


def forward_config(hidden: Tensor, head: LMHead) -> TileConfig:
    """Return the reviewed tile shape, never a tuned one: the same whether rows are saved or not."""
    return tile_config(architecture(hidden.device), hidden.dtype, epilogue_of(head))
