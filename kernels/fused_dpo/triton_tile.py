"""The tile that every Triton kernel here computes: logits of some rows and some vocabulary columns, in registers."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_dpo.head import LMHead


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors (TRITON_INTERPRET=1 when triton was imported)."""
    return bool(triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue]


def architecture(device: torch.device) -> int:
    """Compute capability as in `tile_config`: 90 for 9.0, 0 under the interpreter."""
    if interpreted():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the device of `tensor`: Triton takes the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def tile_arguments(hidden: Tensor, rows: Tensor, head: LMHead) -> dict[str, Any]:
    """What `logits_tile` takes from hidden states and head, by name.

    The adapter's inner product `scale * hidden @ a.T` of the scored `rows` is formed here. A part that is missing is
    stood in for by the weight, and never read.
    """
    weight = head.weight
    lora_h, lora_b, rank = weight, weight, 0
    if head.lora is not None:
        a, lora_b, scale = head.lora
        rank = a.shape[0]
        lora_h = (scale * (hidden[rows] @ a.to(hidden.dtype).T)).contiguous()
    return {
        "hidden_ptr": hidden,
        "weight_ptr": weight,
        "bias_ptr": weight if head.bias is None else head.bias.contiguous(),
        "lora_h_ptr": lora_h,
        "lora_b_ptr": lora_b,
        "V": weight.shape[0],
        "D": weight.shape[1],
        "stride_ht": hidden.stride(0),
        "stride_hd": hidden.stride(1),
        "stride_wv": weight.stride(0),
        "stride_wd": weight.stride(1),
        "stride_bv": lora_b.stride(0),
        "stride_br": lora_b.stride(1),
        "logit_scale": head.logit_scale,
        "softcap": head.softcap or 1.0,
        "inverse_temperature": 1.0 / head.temperature,
        "RANK": rank,
        "BLOCK_R": max(16, triton.next_power_of_2(rank)),
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": head.softcap is not None,
    }


@triton.jit
def surprise_of(logp):
    """`1 - exp(logp)`, by its series where the difference would lose its digits."""
    series = -logp * (1.0 + logp / 2.0 * (1.0 + logp / 3.0 * (1.0 + logp / 4.0 * (1.0 + logp / 5.0))))
    return tl.where(logp > -0.1, series, 1.0 - tl.exp(logp))


@triton.jit
def logits_tile(
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
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """fp32 logits `[BLOCK_T, BLOCK_V]` of hidden rows `rows` and weight rows `offs_v`; -inf beyond V.

    `rows` int64 are positions in the hidden states, `offs_t` those among the scored rows (for `lora_h`, contiguous
    `[scored rows, RANK]` and scaled already). Operands are taken in the hidden states' dtype, products are accumulated
    in fp32; fp32 operands are multiplied in full fp32.
    """
    mask_v = offs_v < V
    wide_v = offs_v.to(tl.int64)  # V x D passes 2^31
    acc = tl.zeros([BLOCK_T, BLOCK_V], dtype=tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        h = tl.load(
            hidden_ptr + rows[:, None] * stride_ht + offs_d[None, :] * stride_hd,
            mask=mask_t[:, None] & mask_d[None, :],
            other=0.0,
        )
        w = tl.load(
            weight_ptr + wide_v[None, :] * stride_wv + offs_d[:, None] * stride_wd,
            mask=mask_v[None, :] & mask_d[:, None],
            other=0.0,
        )
        acc = tl.dot(h, w.to(h.dtype), acc, input_precision="ieee")
    if RANK > 0:
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = offs_r < RANK
        lora_h = tl.load(
            lora_h_ptr + offs_t.to(tl.int64)[:, None] * RANK + offs_r[None, :],
            mask=mask_t[:, None] & mask_r[None, :],
            other=0.0,
        )
        lora_b = tl.load(
            lora_b_ptr + wide_v[None, :] * stride_bv + offs_r[:, None] * stride_br,
            mask=mask_v[None, :] & mask_r[:, None],
            other=0.0,
        )
        acc = tl.dot(lora_h, lora_b.to(lora_h.dtype), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    acc *= logit_scale
    if HAS_SOFTCAP:
        # tanh(x) = 2 sigmoid(2x) - 1: saturates instead of overflowing
        acc = softcap * (2.0 * tl.sigmoid(2.0 * acc / softcap) - 1.0)
    acc *= inverse_temperature
    return tl.where(mask_v[None, :], acc, float("-inf"))
