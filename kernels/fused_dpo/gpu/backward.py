"""Exact backward on CUDA by vocabulary slices: a fused kernel for dz, library matmuls with fp32 accumulation for both
gradients.

dz of a slice goes through a bounded workspace, as both gradients contract it over different dimensions: one program
cannot hold an `[rows, D]` accumulator in registers, and recomputing dz for each of them would cost a fifth pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_dpo.gpu.adapter import through_adapter
from fused_dpo.gpu.configs import TileConfig
from fused_dpo.gpu.launch import OF_BATCH, Product, Tiles, WeightSlice, launch, scored, weight_slices
from fused_dpo.gpu.tile import exp, grouped_block, grouped_other, logits_tile, through_softcap
from fused_dpo.head import HeadGrads, HeadInputs, LMHead, Needs
from fused_dpo.linalg.gradient_sums import GradientSums
from fused_dpo.linalg.matmul import fp32_sums, in_range, matmul_fp32, matmul_precision
from fused_dpo.linalg.operands import Operands
from fused_dpo.linalg.sizes import ceil_div
from fused_dpo.stats import SoftmaxState


@triton.jit(do_not_specialize=OF_BATCH)
def _dlogits_kernel(
    hidden_ptr,
    weight_ptr,
    inputs,
    row_index_ptr,
    target_ptr,
    state_ptr,
    upstream_ptr,
    dz_ptr,
    first_v,
    width,
    stride_z,
    group,
    T,
    R,
    OPTIONS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute `dz = upstream * (onehot(target) - exp(z - peak) / total)` times the derivative of softcap and scale.

    Grid: row blocks x column blocks of the slice, in the order of `grouped_block`. Writes `[R, width]` in the hidden
    states' dtype. A row block whose upstream gradient is 0 throughout writes zeros and multiplies nothing.

    Roofline: one pass (2·R·D·width FLOP), bound by the matrix units; writes R·width numbers. With a product that is
    GIVEN: 4·R·width bytes in, 2·R·width out.
    """
    blocks = tl.cdiv(R, BLOCK_T)
    pid_t = grouped_block(blocks, group)
    pid_v = grouped_other(blocks, group)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < R
    columns = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    upstream = tl.load(upstream_ptr + offs_t, mask=mask_t, other=0.0)
    dz = tl.zeros([BLOCK_T, BLOCK_V], dtype=tl.float32)
    if tl.max((upstream != 0.0).to(tl.int32)) > 0:  # a NaN counts: it has to come out again
        rows = tl.load(row_index_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
        target = tl.load(target_ptr + rows, mask=mask_t, other=-1)
        offs_v = first_v + columns
        z = logits_tile(
            hidden_ptr,
            weight_ptr,
            inputs,
            rows,
            mask_t,
            offs_t,
            offs_v,
            pid_t * BLOCK_T,
            first_v + pid_v * BLOCK_V,
            OPTIONS,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
        )
        peak = tl.load(state_ptr + rows, mask=mask_t, other=float("inf"))
        total = tl.load(state_ptr + T + rows, mask=mask_t, other=1.0)
        one_minus_p = tl.load(state_ptr + 2 * T + rows, mask=mask_t, other=0.0)
        hit = offs_v[None, :] == target[:, None]
        dz = tl.where(hit, one_minus_p[:, None], exp(z - peak[:, None]) * (-1.0 / total)[:, None])
        dz = through_softcap(dz, z, inputs, OPTIONS)
        dz *= (upstream * (inputs.logit_scale * inputs.inverse_temperature))[:, None]
        dz = tl.where((upstream == 0.0)[:, None], 0.0, dz)  # of an invalid label it is NaN until here
    out = dz_ptr + offs_t.to(tl.int64)[:, None] * stride_z + columns[None, :]
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=mask_t[:, None] & (columns < width)[None, :])


class ScoredRows(NamedTuple):
    """What dz is formed from, beside the head: R rows, all of them scored."""

    hidden: Tensor
    """[R, D]."""
    target: Tensor
    """int64 [R]."""
    state: SoftmaxState
    """[3 or more, R]."""
    upstream: Tensor
    """fp32 [R], gradients of their log-probs."""
    lora_h: Tensor | None
    """The adapter's inner product [R, rank], if there is an adapter."""

    def part(self, span: slice) -> "ScoredRows":
        """Take some of the rows."""
        lora_h = None if self.lora_h is None else self.lora_h[span]
        return ScoredRows(self.hidden[span], self.target[span], self.state.of(span), self.upstream[span], lora_h)


class DLogits:
    """Launches of the kernel for some rows."""

    def __init__(self, scored_rows: ScoredRows, head: LMHead, *, config: TileConfig) -> None:
        hidden, target, state, upstream, lora_h = scored_rows
        R, D = hidden.shape
        rows = torch.arange(R, device=hidden.device)
        self._config = config
        self._tiles = Tiles(hidden, rows, head, lora_h, self._config)
        self._arguments: dict[str, Any] = {
            **self._config.constants,
            "row_index_ptr": rows,
            "target_ptr": target,
            "state_ptr": state.values.contiguous(),
            "upstream_ptr": upstream,
            "T": R,
            "R": R,
            "group": self._config.blocks_in_cache(D * hidden.element_size()),
        }

    def __call__(self, dz: Tensor, source: WeightSlice | Product) -> None:
        """Fill `dz` [R, columns] for the columns from the source's first on; see `Tiles.arguments`."""
        arguments = {**self._tiles.arguments(source), **self._arguments}
        arguments |= {"dz_ptr": dz, "first_v": source.first, "width": dz.shape[1], "stride_z": dz.stride(0)}
        grid = ceil_div(dz.shape[0], self._config.block_t) * ceil_div(dz.shape[1], self._config.block_v)
        launch(_dlogits_kernel, (grid,), dz, **arguments)


FormDLogits = Callable[[ScoredRows, LMHead], Callable[[Tensor, WeightSlice], None]]
"""Makes what fills dz [R, columns] for a slice of the head's weight."""


def slice_width(R: int, V: int, itemsize: int, size: int) -> int:
    """Choose how many columns a slice has whose dz fits into `size` bytes: a multiple of 256, hardly beyond V.

    Few, wide slices: each reads and writes the fp32 gradient of the hidden states once.
    """
    return min(max(size // (R * itemsize) // 256, 1), ceil_div(V, 256)) * 256


def triton_backward(
    dlogps: Tensor,
    inputs: HeadInputs,
    state: SoftmaxState,
    form_dlogits: FormDLogits,
    *,
    needs: Needs,
    dweight: Tensor | None = None,
) -> HeadGrads:
    """Compute the exact gradients of `sum(dlogps * logps)`, only those asked for: `streaming_backward` on CUDA.

    Numerics: dz is held in the hidden states' dtype (fp16: scaled so that its largest upstream gradient is 1, as its
        range ends at 6e-8); both products accumulate in fp32 and are rounded once.
    Memory: `workspace_mib`, 4·D bytes a scored row for the hidden states' gradient, and a copy of the scored hidden
        states if not all rows are scored. The weight's gradient is written to `dweight` where that is given, a slice
        once its dz has been formed. No synchronisation with the host.
    """
    hidden, target, rows, head, workspace_mib, shard = inputs
    R = rows.numel()
    sums = GradientSums(Operands(hidden, rows, head, shard), 0, needs, empty=not R, dweight=dweight)
    if not R:
        return sums.finish()
    upstream, unit = in_range(dlogps[rows].float(), hidden.dtype)
    h = scored(hidden, rows)
    lora_h = None if head.lora is None else through_adapter(hidden, rows, head.lora)
    fill = form_dlogits(ScoredRows(h, target[rows], state.of(rows), upstream, lora_h), head)
    _add_slices(sums, h, lora_h, fill, unit, workspace_mib)
    if unit is not None:
        sums.dhidden_sum *= unit
    return sums.finish()


def _add_slices(
    sums: GradientSums,
    h: Tensor,
    lora_h: Tensor | None,
    fill: Callable[[Tensor, WeightSlice], None],
    unit: Tensor | None,
    workspace_mib: int,
) -> None:
    """Add all slices of dz to the hidden states' sums, and write what they give for weight, bias and adapter."""
    operands, head, (R, D) = sums.operands, sums.operands.head, h.shape
    # The weight's gradient is written by the matmul, or a quarter of the workspace takes products on their way there.
    quarter = workspace_mib * 2**18
    quarters = 4 if written_by_matmul(head.weight, h, unit) else 3
    at_once = max(quarter // (4 * D), 256)
    rows_a_column = R if head.weight.dtype == h.dtype else R + D  # of dz, and of the weight where it is converted
    width = slice_width(rows_a_column, operands.V, h.element_size(), quarters * quarter)
    workspace = torch.empty(R, width, dtype=h.dtype, device=h.device)
    for weight in weight_slices(head.weight, h.dtype, width):
        start, stop = weight.first, weight.first + weight.values.shape[0]
        dz = workspace[:, : stop - start]
        fill(dz, weight)
        sums.add_hidden(sums.dhidden_sum, dz, weight.values, start, stop)
        if sums.dweight is not None:
            write_product(dz.T, h, unit, at_once, out=sums.dweight[start:stop])
        if sums.dlora_b is not None and lora_h is not None:
            write_product(dz.T, lora_h, unit, at_once, out=sums.dlora_b[start:stop])
        if sums.dbias is not None:
            total = dz.sum(0, dtype=torch.float32)
            sums.dbias[start:stop] = total if unit is None else total * unit


def written_by_matmul(out: Tensor, a: Tensor, unit: Tensor | None) -> bool:
    """Tell whether the matmul of tensors like `a` can write its result into tensors like `out` as it is."""
    return unit is None and out.dtype == a.dtype


def write_product(a: Tensor, b: Tensor, unit: Tensor | None, at_once: int, out: Tensor) -> None:
    """Write `a @ b`, times `unit` if given, into `out`: accumulated in fp32, rounded once, `at_once` rows at a time."""
    if written_by_matmul(out, a, unit):
        with matmul_precision(torch.float32), fp32_sums():
            torch.mm(a, b, out=out)
        return
    for first in range(0, out.shape[0], at_once):
        here = slice(first, first + at_once)
        out[here] = matmul_fp32(a[here], b) if unit is None else matmul_fp32(a[here], b).mul_(unit)
