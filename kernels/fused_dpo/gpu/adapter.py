"""The inner product of a low-rank adapter on CUDA, by one kernel that is the same whatever the batch.

A library's matmul would not do: it may choose another kernel for another number of rows, or cut the inner dimension
otherwise for another place in the product, and a row's bits would depend on what stands beside it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_dpo.gpu.launch import OF_BATCH, launch, rank_block
from fused_dpo.linalg.sizes import ceil_div

ADAPTER_ROWS = 64
"""Scored rows of a program."""
BLOCK_BYTES = 128
"""How much of a row of hidden states a step of the accumulation takes."""


@triton.jit(do_not_specialize=OF_BATCH)
def _through_adapter_kernel(
    hidden_ptr,
    row_index_ptr,
    a_ptr,
    out_ptr,
    scale,
    R,
    D,
    stride_ht,
    stride_hd,
    stride_ar,
    stride_ad,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute `scale * hidden[row_index] @ a.T`, contiguous [R, RANK], accumulated in fp32 and rounded once.

    Grid: (row blocks, blocks of the rank). Reads the scored hidden states once a block of the rank; bound by memory.
    """
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_t, mask_r = offs_t < R, offs_r < RANK
    rows = tl.load(row_index_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
    acc = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        wide_d = offs_d.to(tl.int64)  # the hidden states may be transposed
        h = tl.load(
            hidden_ptr + rows[:, None] * stride_ht + wide_d[None, :] * stride_hd,
            mask=mask_t[:, None] & mask_d[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + offs_r[None, :] * stride_ar + wide_d[:, None] * stride_ad,
            mask=mask_r[None, :] & mask_d[:, None],
            other=0.0,
        )
        acc = tl.dot(h, a, acc, input_precision="ieee")
    out = out_ptr + offs_t.to(tl.int64)[:, None] * RANK + offs_r[None, :]
    tl.store(out, (acc * scale).to(out_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_r[None, :])


def through_adapter(hidden: Tensor, rows: Tensor, lora: tuple[Tensor, Tensor, float]) -> Tensor:
    """Compute the adapter's inner product `scale * hidden[rows] @ a.T` [R, rank], in the hidden states' dtype."""
    a, _, scale = lora
    a = a.to(hidden.dtype)
    (rank, D), R = a.shape, rows.numel()
    through = torch.empty(R, rank, dtype=hidden.dtype, device=hidden.device)
    arguments: dict[str, Any] = {"hidden_ptr": hidden, "row_index_ptr": rows, "a_ptr": a, "out_ptr": through}
    arguments |= {"scale": float(scale), "R": R, "D": D, "stride_ht": hidden.stride(0), "stride_hd": hidden.stride(1)}
    arguments |= {"stride_ar": a.stride(0), "stride_ad": a.stride(1), "RANK": rank, "BLOCK_T": ADAPTER_ROWS}
    arguments |= {"BLOCK_R": rank_block(rank, hidden.dtype), "BLOCK_D": BLOCK_BYTES // hidden.element_size()}
    grid = ceil_div(R, ADAPTER_ROWS), ceil_div(rank, arguments["BLOCK_R"])
    launch(_through_adapter_kernel, grid, hidden, **arguments)
    return through
