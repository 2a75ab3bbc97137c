"""dz of the rows whose exponentials the forward has left."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fused_dpo.gpu.backward import DLogits, ScoredRows
from fused_dpo.gpu.configs import TileConfig
from fused_dpo.gpu.exponentials import SIDE, Exponentials
from fused_dpo.gpu.launch import OF_BATCH, WeightSlice, launch
from fused_dpo.gpu.tile import exp
from fused_dpo.head import LMHead
from fused_dpo.linalg.sizes import ceil_div


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
    saved_rows,
    T,
    TILE_COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Compute dz of saved rows, as `_dlogits_kernel` does, from the forward's exponentials.

    Grid: row blocks x column blocks of the slice. Reads and writes saved_rows·width numbers; bound by memory.
    """
    blocks = saved_rows // SIDE
    pid_v = tl.program_id(0) // blocks
    offs_t = tl.program_id(0) % blocks * SIDE + tl.arange(0, SIDE)
    columns = pid_v * SIDE + tl.arange(0, SIDE)
    offs_v = first_v + columns
    mask_v = offs_v < V
    saved = exponentials_ptr + offs_v.to(tl.int64)[None, :] * stride_ev + offs_t[:, None]
    exponentials = tl.load(saved, mask=mask_v[None, :], other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + (first_v + pid_v * SIDE) // TILE_COLUMNS * saved_rows + offs_t)
    target = tl.load(target_ptr + offs_t)
    peak = tl.load(state_ptr + offs_t)
    total = tl.load(state_ptr + T + offs_t)
    one_minus_p = tl.load(state_ptr + 2 * T + offs_t)
    upstream = tl.load(upstream_ptr + offs_t)
    hit = offs_v[None, :] == target[:, None]
    dz = tl.where(hit, one_minus_p[:, None], exponentials * (exp(shift - peak) * (-1.0 / total))[:, None])
    dz = tl.where((upstream == 0.0)[:, None], 0.0, dz * (upstream * factor)[:, None])
    out = dz_ptr + offs_t.to(tl.int64)[:, None] * stride_z + columns[None, :]
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=(columns < width)[None, :])


class DLogitsOfExponentials:
    """`fused_dpo.gpu.backward.FormDLogits` where the forward has saved exponentials of the first rows."""

    def __init__(
        self, exponentials: Exponentials, scored_rows: ScoredRows, head: LMHead, *, config: TileConfig
    ) -> None:
        hidden, target, state, upstream, _ = scored_rows
        saved = exponentials.rows
        self._saved, self._side = saved, min(SIDE, exponentials.tile_columns)
        self._others = None
        if saved < hidden.shape[0]:
            self._others = DLogits(scored_rows.part(slice(saved, None)), head, config=config)
        self._arguments: dict[str, Any] = {
            **exponentials.arguments(hidden.dtype),
            "target_ptr": target,
            "state_ptr": state.values.contiguous(),
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
        grid = self._saved // self._side * ceil_div(dz.shape[1], self._side)
        launch(_dlogits_of_exponentials_kernel, (grid,), dz, **self._arguments, **arguments)
        if self._others is not None:
            self._others(dz[self._saved :], weight)
