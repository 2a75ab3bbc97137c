"""The tile that every Triton kernel here computes: logits of some rows and some vocabulary columns, in registers."""

# pyright: reportAttributeAccessIssue=false
# for the fields of a constexpr, which kernels read

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
UNIT = tl.constexpr(2.0**40)
"""Sums that are to have the same bits in any order are taken in multiples of its inverse, see `linalg.fixed_point`."""


@triton.jit
def exp(x):
    """Compute `exp(x)` in a multiplication and one instruction; results below 2^-126 are 0.

    `tl.exp` keeps subnormal results, at four instructions more.
    """
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh(x):
    """Compute tanh by exponentials, which saturate instead of overflowing; by its series where these lose digits."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return tl.where(square < 0.0625, series, 1.0 - 2.0 / (1.0 + exp(2.0 * x)))


@triton.jit
def grouped_block(blocks, group):
    """Find this program's row block, in a grid of `blocks` times as many programs as there are along the other axis.

    Groups of row blocks, whose hidden states fit into the L2 cache, take the other axis side by side: hidden states are
    read from memory once, and the weight streams from it once a group.
    """
    others = tl.num_programs(0) // blocks
    first = tl.program_id(0) // (group * others) * group
    return first + tl.program_id(0) % (group * others) % tl.minimum(blocks - first, group)


@triton.jit
def grouped_other(blocks, group):
    """Find this program's place along the other axis of the grid of `grouped_block`."""
    others = tl.num_programs(0) // blocks
    first = tl.program_id(0) // (group * others) * group
    return tl.program_id(0) % (group * others) // tl.minimum(blocks - first, group)


@triton.jit
def one_minus_p_of(logp):
    """Compute `1 - exp(logp)`, by its series where the difference would lose its digits."""
    series = -logp * (1.0 + logp / 2.0 * (1.0 + logp / 3.0 * (1.0 + logp / 4.0 * (1.0 + logp / 5.0))))
    return tl.where(logp > -0.1, series, 1.0 - exp(logp))


@triton.jit
def logits_tile(
    hidden_ptr,
    weight_ptr,
    inputs,
    rows,
    mask_t,
    offs_t,
    offs_v,
    first_t,
    first_v,
    OPTIONS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute fp32 logits `[BLOCK_T, BLOCK_V]` of hidden rows `rows` and weight rows `offs_v`; -inf beyond V.

    `rows` int64 are positions in the hidden states, `offs_t` those among the scored rows. Operands are taken in the
    hidden states' dtype, products are accumulated in fp32; fp32 operands are multiplied in full fp32. `inputs` and
    OPTIONS are `TileInputs` and `TileOptions`: GIVEN reads a `Product` of the scored rows, DESCRIBED loads by tensor
    descriptors, the scored rows from `first_t` on and the weight's from `first_v` on, and fills up with zeros.
    """
    mask_v = offs_v < inputs.V
    wide_v = offs_v.to(tl.int64)  # V x D passes 2^31
    weight_rows = wide_v - inputs.weight_first
    if OPTIONS.GIVEN:
        columns = (offs_v - inputs.product_first)[None, :]
        acc = tl.load(
            inputs.product + offs_t[:, None] * inputs.stride_pt + columns * inputs.stride_pv,
            mask=mask_v[None, :],
            other=0.0,
        )
    else:
        acc = tl.zeros([BLOCK_T, BLOCK_V], dtype=tl.float32)
        for start_d in range(0, inputs.D, BLOCK_D):
            if OPTIONS.DESCRIBED:
                h = hidden_ptr.load([first_t, start_d])
                w = weight_ptr.load([first_v - inputs.weight_first, start_d]).T
            else:
                offs_d = start_d + tl.arange(0, BLOCK_D)
                mask_d = offs_d < inputs.D
                wide_d = offs_d.to(tl.int64)  # where transposed, D x V, too
                h = tl.load(
                    hidden_ptr + rows[:, None] * inputs.stride_ht + wide_d[None, :] * inputs.stride_hd,
                    mask=mask_t[:, None] & mask_d[None, :],
                    other=0.0,
                )
                w = tl.load(
                    weight_ptr + weight_rows[None, :] * inputs.stride_wv + wide_d[:, None] * inputs.stride_wd,
                    mask=mask_v[None, :] & mask_d[:, None],
                    other=0.0,
                )
            acc = tl.dot(h, w.to(h.dtype), acc, input_precision="ieee")
    for start_r in range(0, OPTIONS.RANK, OPTIONS.BLOCK_R):
        offs_r = start_r + tl.arange(0, OPTIONS.BLOCK_R)
        mask_r = offs_r < OPTIONS.RANK
        lora_h = tl.load(
            inputs.lora_h + offs_t.to(tl.int64)[:, None] * OPTIONS.RANK + offs_r[None, :],
            mask=mask_t[:, None] & mask_r[None, :],
            other=0.0,
        )
        lora_b = tl.load(
            inputs.lora_b + wide_v[None, :] * inputs.stride_bv + offs_r[:, None] * inputs.stride_br,
            mask=mask_v[None, :] & mask_r[:, None],
            other=0.0,
        )
        acc = tl.dot(lora_h, lora_b.to(lora_h.dtype), acc, input_precision="ieee")
    if OPTIONS.HAS_BIAS:
        acc += tl.load(inputs.bias + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    if OPTIONS.HAS_SCALE:
        acc *= inputs.logit_scale
    if OPTIONS.HAS_SOFTCAP:
        acc = inputs.softcap * tanh(acc * (1.0 / inputs.softcap))
    if OPTIONS.HAS_SCALE:
        acc *= inputs.inverse_temperature
    return tl.where(mask_v[None, :], acc, float("-inf"))


@triton.jit
def through_softcap(dz, z, inputs, OPTIONS: tl.constexpr):
    """Multiply `dz` with the derivative of the softcap, if there is one, at the logits `z`; 1 beyond V."""
    if OPTIONS.HAS_SOFTCAP:  # d tanh(u) = 1 - tanh(u)^2
        ratio = tl.where(z == float("-inf"), 0.0, z) * (1.0 / (inputs.softcap * inputs.inverse_temperature))
        dz *= 1.0 - ratio * ratio
    return dz
