"""What stands for dropped columns, as in `fused_dpo.streaming.dropped_means`: all blocks and columns in one launch."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_dpo.gpu import configs as triton_configs
from fused_dpo.gpu.launch import launch
from fused_dpo.gpu.tile import UNIT
from fused_dpo.linalg.operands import Operands
from fused_dpo.linalg.sizes import round_up
from fused_dpo.vocab_parallel.collectives import sum_over_ranks

TAIL_SCALE = 4096.0
"""Factor on mean probabilities, and divisor of what they are multiplied with: fp16 ends at 6e-8."""
TAIL_BLOCK = 8192
"""Columns that a program takes at a time."""


@triton.jit
def _power(exponent):
    """Raise 2 to a biased exponent; the smallest exponent gives 0, and so does that of what is not finite."""
    bits = exponent.to(tl.int32)
    return tl.where(bits == 255, 0.0, (bits << 23).to(tl.float32, bitcast=True))


@triton.jit
def _dropped_means_kernel(
    means_ptr,
    keep_ptr,
    offset_ptr,
    out_ptr,
    units_ptr,
    mass_ptr,
    V,
    stride_mb,
    stride_kb,
    stride_ob,
    scale,
    inverse_softcap,
    HAS_SOFTCAP: tl.constexpr,
    SUM: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute the `DroppedMeans` of one block of rows: SUM what they are divided by, and WRITE them.

    Where the vocabulary is split over ranks, one launch sums, into `units` int64 [blocks, 2], and when these have been
    added up another one writes. In integers, so that the order of the columns is nothing to the bits.

    Grid: blocks. Reads 2·V bytes twice and writes 2·V or 4·V; bound by latency.
    """
    block = tl.program_id(0).to(tl.int64)
    means_ptr += block * stride_mb
    keep_ptr += block * stride_kb
    if SUM:
        everything = tl.full([], 0, dtype=tl.int64)
        dropped = tl.full([], 0, dtype=tl.int64)
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            power = _power(tl.load(means_ptr + offs_v, mask=offs_v < V, other=0))
            keep = tl.load(keep_ptr + offs_v, mask=offs_v < V, other=1)
            units = (power * UNIT).to(tl.int64)
            everything += tl.sum(units)
            dropped += tl.sum(tl.where(keep != 0, 0, units))
        if not WRITE:
            tl.store(units_ptr + 2 * block, everything)
            tl.store(units_ptr + 2 * block + 1, dropped)
            return
    else:
        everything = tl.load(units_ptr + 2 * block)
        dropped = tl.load(units_ptr + 2 * block + 1)
    unit = 1.0 / tl.maximum(everything.to(tl.float32) * (1.0 / UNIT), 1.1754944e-38)
    tl.store(mass_ptr + block, dropped.to(tl.float32) * (1.0 / UNIT) * unit)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        keep = tl.load(keep_ptr + offs_v, mask=offs_v < V, other=1)
        p = tl.where(keep != 0, 0.0, _power(tl.load(means_ptr + offs_v, mask=offs_v < V, other=0)) * unit)
        if HAS_SOFTCAP:  # d tanh(u) = 1 - tanh(u)^2, at the logit that has this probability
            ratio = (tl.log(tl.maximum(p, 1.1754944e-38)) + tl.load(offset_ptr + block)) * inverse_softcap
            p *= 1.0 - ratio * ratio
        tl.store(
            out_ptr + block * stride_ob + offs_v, (p * scale).to(out_ptr.dtype.element_ty), mask=offs_v < stride_ob
        )


class DroppedMeans(NamedTuple):
    """What stands for the columns that each block of rows drops: their mean probabilities."""

    values: Tensor
    """[blocks, V] in the hidden states' dtype: times the derivative of the softcap there, times TAIL_SCALE; 0 where a
    column is kept, and in memory beyond V up to a whole narrow block. The factors that all logits have in common are
    left out."""
    mass: Tensor
    """fp32 [blocks]: what the probabilities themselves sum to, on all ranks."""


def dropped_means(operands: Operands, means: Tensor, keep: Tensor, offset: Tensor) -> DroppedMeans:
    """Compute what `fused_dpo.streaming.dropped_means.Tail` does, in half precision where the hidden states are."""
    (blocks, V), head = keep.shape, operands.head
    whole = round_up(V, triton_configs.NARROW_COLUMNS)  # rows begin at multiples of 16 bytes, too
    values = means.new_empty(blocks, whole, dtype=operands.dtype)[:, :V]
    mass = means.new_empty(blocks, dtype=torch.float32)
    arguments: dict[str, Any] = {"means_ptr": means, "stride_mb": means.stride(0), "keep_ptr": keep}
    arguments |= {"stride_kb": keep.stride(0), "offset_ptr": offset, "mass_ptr": mass, "V": V}
    arguments |= {"out_ptr": values, "stride_ob": values.stride(0), "scale": TAIL_SCALE}
    arguments |= {"HAS_SOFTCAP": head.softcap is not None, "inverse_softcap": head.temperature / (head.softcap or 1.0)}
    arguments |= {"BLOCK_V": TAIL_BLOCK, "num_warps": 8}
    if operands.shard is None:
        launch(_dropped_means_kernel, (blocks,), values, **arguments, units_ptr=mass, SUM=True, WRITE=True)
        return DroppedMeans(values, mass)
    units = means.new_empty(blocks, 2, dtype=torch.int64)
    launch(_dropped_means_kernel, (blocks,), values, **arguments, units_ptr=units, SUM=True, WRITE=False)
    sum_over_ranks(units, operands.shard)
    launch(_dropped_means_kernel, (blocks,), values, **arguments, units_ptr=units, SUM=False, WRITE=True)
    return DroppedMeans(values, mass)
