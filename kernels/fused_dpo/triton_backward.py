"""Exact backward on CUDA by vocabulary slices: a fused kernel for dz, library matmuls with fp32 accumulation for both
gradients.

dz of a slice goes through a bounded workspace, as both gradients contract it over different dimensions: one program
cannot hold an `[rows, D]` accumulator in registers, and recomputing dz for each of them would cost a fifth pass.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_dpo.head import HeadGrads, LMHead
from fused_dpo.precision import matmul_precision
from fused_dpo.triton_autotune import choose_config
from fused_dpo.triton_tile import architecture, interpreted, logits_tile, on_device, surprise_of, tile_arguments


@triton.jit
def _dlogits_kernel(
    hidden_ptr,
    row_index_ptr,
    target_ptr,
    weight_ptr,
    bias_ptr,
    lora_h_ptr,
    lora_b_ptr,
    state_ptr,
    upstream_ptr,
    dz_ptr,
    first_v,
    width,
    stride_z,
    T,
    R,
    V,
    D,
    stride_ht,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_bv,
    stride_br,
    logit_scale,
    softcap,
    inverse_temperature,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`dz = upstream * (onehot(target) - exp(z - peak) / total)` times the derivative of what happens to the logits.

    Grid: (row blocks, column blocks of the slice). Writes `[R, width]` in the hidden states' dtype. A row block whose
    upstream gradient is 0 throughout writes zeros and multiplies nothing.

    Roofline: one pass (2·R·D·width FLOP), bound by the matrix units; writes R·width numbers.
    """
    pid_t = tl.program_id(0)
    pid_v = tl.program_id(1)
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
            rows,
            mask_t,
            weight_ptr,
            offs_v,
            bias_ptr,
            lora_h_ptr,
            offs_t,
            lora_b_ptr,
            V,
            D,
            stride_ht,
            stride_hd,
            stride_wv,
            stride_wd,
            stride_bv,
            stride_br,
            logit_scale,
            softcap,
            inverse_temperature,
            RANK,
            BLOCK_R,
            HAS_BIAS,
            HAS_SOFTCAP,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
        )
        peak = tl.load(state_ptr + rows, mask=mask_t, other=float("inf"))
        total = tl.load(state_ptr + T + rows, mask=mask_t, other=1.0)
        hit = offs_v[None, :] == target[:, None]
        at_target = surprise_of(tl.sum(tl.where(hit, z, 0.0), axis=1) - peak - tl.log(total))
        dz = tl.where(hit, at_target[:, None], -tl.exp(z - peak[:, None]) / total[:, None])
        if HAS_SOFTCAP:  # d tanh(u) = 1 - tanh(u)^2
            ratio = z / (softcap * inverse_temperature)
            dz *= 1.0 - ratio * ratio
        dz *= (upstream * (logit_scale * inverse_temperature))[:, None]
    out = dz_ptr + offs_t.to(tl.int64)[:, None] * stride_z + columns[None, :]
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=mask_t[:, None] & (columns < width)[None, :])


def slice_width(R: int, V: int, itemsize: int, workspace_mib: int) -> int:
    """Columns of a slice whose dz fits into three quarters of the workspace: a multiple of 256, and not much beyond V.

    The last quarter is for products on their way into a sum. Few, wide slices: each reads and writes the fp32 gradient
    of the hidden states once.
    """
    fits = workspace_mib * 2**20 * 3 // 4 // (max(R, 1) * itemsize)
    return min(max(fits // 256, 1), -(-V // 256)) * 256


def triton_backward(
    dlogps: Tensor,
    hidden: Tensor,
    target: Tensor,
    rows: Tensor,
    state: Tensor,
    head: LMHead,
    workspace_mib: int,
    *,
    needs: tuple[bool, bool, bool, bool, bool],
) -> HeadGrads:
    """Exact gradients of `sum(dlogps * logps)`, only those asked for: `streaming_backward` on CUDA.

    Numerics: dz is held in the hidden states' dtype (fp16: scaled so that its largest upstream gradient is 1, as its
        range ends at 6e-8); both products accumulate in fp32 and are rounded once.
    Memory: `workspace_mib`, 4·D bytes a scored row for the hidden states' gradient, and a copy of the scored hidden
        states if not all rows are scored. No synchronisation with the host.
    """
    need_hidden, need_weight, need_bias, need_a, need_b = needs
    R, (V, D) = rows.numel(), head.weight.shape
    config = choose_config(architecture(hidden.device), hidden, head, want_stats=False)
    upstream = dlogps[rows].float()
    unit = torch.ones((), device=hidden.device)
    if hidden.dtype == torch.float16 and R:
        unit = upstream.abs().amax().clamp_(min=torch.finfo(torch.float32).tiny)
        upstream = upstream / unit
    arguments: dict[str, Any] = {
        **tile_arguments(hidden, rows, head),
        "row_index_ptr": rows,
        "target_ptr": target,
        "state_ptr": state,
        "T": hidden.shape[0],
        "upstream_ptr": upstream,
        "R": R,
    }
    h = hidden if hidden.shape[0] == R else hidden[rows]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=hidden.device)

    rank = 0 if head.lora is None else head.lora[0].shape[0]
    dhidden_rows = zeros(R, D) if need_hidden else None
    through_a = zeros(R, rank) if rank and (need_hidden or need_a) else None
    dweight = torch.zeros_like(head.weight, memory_format=torch.contiguous_format) if need_weight else None
    dbias = torch.zeros_like(head.bias) if head.bias is not None and need_bias else None
    dlora_b = None
    if head.lora is not None and need_b:
        dlora_b = torch.zeros_like(head.lora[1], memory_format=torch.contiguous_format)

    width = slice_width(R, V, hidden.element_size(), workspace_mib)
    workspace = torch.empty(R, width, dtype=hidden.dtype, device=hidden.device)
    block_rows = max(workspace_mib * 2**20 // 4 // (4 * D), 256)
    dz_blocks = [slice(first, first + block_rows) for first in range(0, R, block_rows)]
    for start in range(0, V if R else 0, width):
        stop = min(start + width, V)
        dz = workspace[:, : stop - start]
        grid = (triton.cdiv(R, config.block_t), triton.cdiv(stop - start, config.block_v))
        slice_arguments: dict[str, Any] = {"dz_ptr": dz, "first_v": start, "width": stop - start, "stride_z": width}
        with on_device(hidden):
            _dlogits_kernel[grid](**arguments, **slice_arguments, **config.constants)
        if dhidden_rows is not None:
            for block in dz_blocks:
                dhidden_rows[block] += matmul_fp32(dz[block], head.weight[start:stop])
        if dweight is not None:
            dweight[start:stop] = unit * matmul_fp32(dz.T, h)
        if dbias is not None:
            dbias[start:stop] = unit * dz.sum(0, dtype=torch.float32)
        if head.lora is not None:
            if through_a is not None:
                through_a += head.lora[2] * matmul_fp32(dz, head.lora[1][start:stop])
            if dlora_b is not None:
                dlora_b[start:stop] = unit * matmul_fp32(dz.T, arguments["lora_h_ptr"])

    dlora_a = dhidden = None
    if head.lora is not None and through_a is not None:
        a = head.lora[0]
        if need_a:
            dlora_a = (unit * (through_a.T @ h.float())).to(a.dtype)
        if dhidden_rows is not None:
            dhidden_rows += through_a @ a.to(hidden.dtype).float()
    if dhidden_rows is not None:
        dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        dhidden.index_copy_(0, rows, (unit * dhidden_rows).to(hidden.dtype))
    return HeadGrads(dhidden, dweight, dbias, dlora_a, dlora_b)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` accumulated and returned in fp32; `b` is taken in the dtype of `a`."""
    b = b.to(a.dtype)
    if a.dtype == torch.float32 or interpreted():  # CPUs have no half-precision product with a fp32 result
        with matmul_precision(torch.float32):
            return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)
