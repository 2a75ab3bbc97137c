"""The tile that every Triton kernel here computes: logits of some rows and some vocabulary columns, in registers."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_dpo.head import LMHead
from fused_dpo.precision import matmul_fp32
from fused_dpo.triton_configs import TileConfig

ADAPTER_ROWS = 1024
"""Rows that are brought through an adapter at a time."""


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


class Product(NamedTuple):
    """`hidden[rows] @ weight[first:last].T` in fp32, computed elsewhere."""

    values: Tensor
    """[rows, last - first], with as many rows more as fill the last block of a tile: finite, and of no effect. The
    tiles load fastest where it is the rows that are contiguous."""
    first: int


def product_arguments(product: Product | None, stand_in: Tensor) -> dict[str, Any]:
    """What `logits_tile` takes from a product, by name; without one it multiplies, and never reads `stand_in`."""
    values, first = product or (stand_in, 0)
    return {
        "product_ptr": values,
        "stride_pt": values.stride(0),
        "stride_pv": values.stride(1),
        "product_first": first,
        "GIVEN": product is not None,
    }


def scored(hidden: Tensor, rows: Tensor) -> Tensor:
    """The scored rows; a copy only if there are others."""
    return hidden if hidden.shape[0] == rows.numel() else hidden[rows]


def padded(h: Tensor, rows: int) -> Tensor:
    """Hidden rows `h` [rows at most, D] and rows of zeros up to so many; a copy only if some are missing."""
    missing = rows - h.shape[0]
    return F.pad(h, (0, 0, 0, missing)) if missing else h


def through_adapter(hidden: Tensor, lora: tuple[Tensor, Tensor, float]) -> Tensor:
    """The adapter's inner product `scale * hidden @ a.T` [rows, rank], rounded once to the hidden states' dtype.

    By products of one shape: for another the library may choose a kernel that sums in another order, and a row's bits
    would depend on how many there are.
    """
    a, _, scale = lora
    through = hidden.new_empty(hidden.shape[0], a.shape[0])
    for first in range(0, hidden.shape[0], ADAPTER_ROWS):
        part = hidden[first : first + ADAPTER_ROWS]
        through[first : first + ADAPTER_ROWS] = scale * matmul_fp32(padded(part, ADAPTER_ROWS), a.T)[: part.shape[0]]
    return through


def tile_arguments(hidden: Tensor, rows: Tensor, head: LMHead) -> dict[str, Any]:
    """What `logits_tile` takes from hidden states and head, by name.

    The adapter's inner product is formed here. A part that is missing is stood in for by the weight, and never read.
    """
    weight = head.weight
    lora_h, lora_b, rank = weight, weight, 0
    if head.lora is not None:
        a, lora_b, _ = head.lora
        rank = a.shape[0]
        lora_h = through_adapter(scored(hidden, rows), head.lora)
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
        "HAS_SCALE": head.logit_scale != 1.0 or head.temperature != 1.0,
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": head.softcap is not None,
    }


def described(hidden: Tensor, rows: Tensor, weight: Tensor, config: TileConfig) -> dict[str, Any]:
    """Tensor descriptors for `logits_tile` in place of two pointers, by name, if the configuration asks for them.

    They name contiguous rows of one dtype that begin at multiples of 16 bytes, so scored rows are gathered first; other
    operands keep their pointers.
    """
    operands = hidden, weight
    aligned = all(t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == t.data_ptr() % 16 == 0 for t in operands)
    if not (config.described and aligned and hidden.dtype == weight.dtype):
        return {"DESCRIBED": False}
    return {
        "hidden_ptr": TensorDescriptor.from_tensor(scored(hidden, rows), [config.block_t, config.block_d]),
        "weight_ptr": TensorDescriptor.from_tensor(weight, [config.block_v, config.block_d]),
        "DESCRIBED": True,
    }


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """`exp(x)` in a multiplication and one instruction; results below 2^-126 are 0.

    `tl.exp` keeps subnormal results, at four instructions more.
    """
    return tl.exp2(x * LOG2E)


@triton.jit
def grouped_block(blocks, group):
    """Row block of this program of a grid of `blocks` times as many programs as there are along the other axis.

    Groups of row blocks, whose hidden states fit into the L2 cache, take the other axis side by side: hidden states are
    read from memory once, and the weight streams from it once a group.
    """
    others = tl.num_programs(0) // blocks
    first = tl.program_id(0) // (group * others) * group
    return first + tl.program_id(0) % (group * others) % tl.minimum(blocks - first, group)


@triton.jit
def grouped_other(blocks, group):
    """Its place along the other axis."""
    others = tl.num_programs(0) // blocks
    first = tl.program_id(0) // (group * others) * group
    return tl.program_id(0) % (group * others) // tl.minimum(blocks - first, group)


@triton.jit
def surprise_of(logp):
    """`1 - exp(logp)`, by its series where the difference would lose its digits."""
    series = -logp * (1.0 + logp / 2.0 * (1.0 + logp / 3.0 * (1.0 + logp / 4.0 * (1.0 + logp / 5.0))))
    return tl.where(logp > -0.1, series, 1.0 - exp(logp))


@triton.jit
def logits_tile(
    product_ptr,
    hidden_ptr,
    rows,
    mask_t,
    weight_ptr,
    offs_v,
    bias_ptr,
    lora_h_ptr,
    offs_t,
    lora_b_ptr,
    first_t,
    first_v,
    product_first,
    V,
    D,
    stride_pt,
    stride_pv,
    stride_ht,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_bv,
    stride_br,
    logit_scale,
    softcap,
    inverse_temperature,
    GIVEN: tl.constexpr,
    DESCRIBED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """fp32 logits `[BLOCK_T, BLOCK_V]` of hidden rows `rows` and weight rows `offs_v`; -inf beyond V.

    `rows` int64 are positions in the hidden states, `offs_t` those among the scored rows (for `lora_h`, contiguous
    `[scored rows, RANK]` and scaled already). Operands are taken in the hidden states' dtype, products are accumulated
    in fp32; fp32 operands are multiplied in full fp32. GIVEN reads their product instead, of the scored rows and the
    weight's rows from `product_first` on (see `Product`). DESCRIBED loads by tensor descriptors, the scored rows from
    `first_t` on and the weight's from `first_v` on, and fills up with zeros.
    """
    mask_v = offs_v < V
    wide_v = offs_v.to(tl.int64)  # V x D passes 2^31
    if GIVEN:
        acc = tl.load(
            product_ptr + offs_t[:, None] * stride_pt + (offs_v - product_first)[None, :] * stride_pv,
            mask=mask_v[None, :],
            other=0.0,
        )
    else:
        acc = tl.zeros([BLOCK_T, BLOCK_V], dtype=tl.float32)
        for start_d in range(0, D, BLOCK_D):
            if DESCRIBED:
                h = hidden_ptr.load([first_t, start_d])
                w = weight_ptr.load([first_v, start_d]).T
            else:
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
    if HAS_SCALE:
        acc *= logit_scale
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)): saturates instead of overflowing
        acc = softcap * (1.0 - 2.0 / (1.0 + exp(acc * (2.0 / softcap))))
    if HAS_SCALE:
        acc *= inverse_temperature
    return tl.where(mask_v[None, :], acc, float("-inf"))
