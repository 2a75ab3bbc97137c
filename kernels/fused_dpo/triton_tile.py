"""The tile that every Triton kernel here computes: logits of some rows and some vocabulary columns, in registers."""

# pyright: reportAttributeAccessIssue=false
# for the fields of a constexpr, which kernels read

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_dpo.head import LMHead
from fused_dpo.triton_configs import TileConfig

OF_BATCH = (
    *("row_index_ptr", "target_ptr", "index_ptr", "picked_ptr", "logps_ptr", "state_ptr", "stats_ptr", "upstream_ptr"),
    *("peak_ptr", "total_ptr", "weighted_ptr", "sum_ptr", "tail_ptr", "bound_ptr", "residual_ptr", "smallest_ptr"),
    *("T", "R", "M", "blocks", "first_split", "kept_rows"),
)
"""Parameters of kernels that hang on the batch, and for whose values nothing is compiled.

Triton compiles a kernel anew where an integer is 1 or a multiple of 16, or a pointer one of 16 bytes, and lays out its
numbers among the threads by what it knows: two such kernels may sum in two orders, and a sequence's log-prob would hang
on how many rows there are beside its own. Training would also stop for the compiler at every new kind of batch.
"""


def named(stem: str, **flags: tuple[str, str]) -> Callable[[Any], str]:
    """Names of a kernel's variants, for profilers: the stem, and for each constant what stands for true and false."""

    def name(specialization: Any) -> str:
        words = (words[not specialization.constants.get(flag)] for flag, words in flags.items())
        return "_".join((stem, *filter(None, words)))

    return name


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors (TRITON_INTERPRET=1 when triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device) -> int:
    """Compute capability as in `tile_config`: 90 for 9.0, 0 under the interpreter."""
    if interpreted():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the device of `tensor`: Triton takes the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


LAUNCH_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Of every kernel. Multiplications and additions are fused; where they are not, sums have other bits. Triton's choice
hangs on its release (3.10 turns fusion off) and on the environment (TRITON_DEFAULT_FP_FUSION)."""


def launch(kernel: Any, grid: tuple[int, ...], tensor: Tensor, /, **arguments: Any) -> None:
    """Launch a kernel with LAUNCH_OPTIONS, on the device of `tensor`."""
    with on_device(tensor):
        kernel[grid](**LAUNCH_OPTIONS, **arguments)


class Product(NamedTuple):
    """`hidden[rows] @ weight[first:last].T` in fp32, computed elsewhere."""

    values: Tensor
    """[rows, last - first], with as many rows more as fill the last block of a tile: finite, and of no effect. The
    tiles load fastest where it is the rows that are contiguous."""
    first: int


class WeightSlice(NamedTuple):
    """Rows of the head's weight from `first` on, in the hidden states' dtype."""

    values: Tensor
    first: int


def weight_slices(weight: Tensor, dtype: torch.dtype, rows: int) -> Iterator[WeightSlice]:
    """Slices of so many rows of the weight in `dtype`: views, or copies that each overwrite the one before.

    Kernels that multiply would convert every tile on its way to the matrix units, and these would wait for it.
    """
    V, D = weight.shape
    copies = None if weight.dtype == dtype else torch.empty(min(rows, V), D, dtype=dtype, device=weight.device)
    for first in range(0, V, rows):
        part = weight[first : first + rows]
        yield WeightSlice(part if copies is None else copies[: part.shape[0]].copy_(part), first)


class TileInputs(NamedTuple):
    """What `logits_tile` takes beside hidden states and weight. Stand-ins are never read."""

    bias: Tensor
    lora_h: Tensor
    """Contiguous [scored rows, RANK], times the adapter's scale."""
    lora_b: Tensor
    product: Tensor
    V: int
    D: int
    stride_ht: int
    stride_hd: int
    stride_wv: int
    stride_wd: int
    weight_first: int
    """Row of the head that is the first of the weight."""
    stride_bv: int
    stride_br: int
    stride_pt: int
    stride_pv: int
    product_first: int
    logit_scale: float
    softcap: float
    inverse_temperature: float


class TileOptions(NamedTuple):
    """What `logits_tile` is compiled for."""

    RANK: int
    """Of the adapter, 0 without one."""
    BLOCK_R: int
    """How much of it is multiplied at a time."""
    HAS_SCALE: bool
    HAS_BIAS: bool
    HAS_SOFTCAP: bool
    DESCRIBED: bool
    """Operands are loaded by tensor descriptors."""
    GIVEN: bool
    """The product of hidden states and weight is read, not formed."""


def scored(hidden: Tensor, rows: Tensor) -> Tensor:
    """The scored rows; a copy only if there are others."""
    return hidden if hidden.shape[0] == rows.numel() else hidden[rows]


def padded(h: Tensor, rows: int) -> Tensor:
    """Hidden rows `h` [rows at most, D] and rows of zeros up to so many; a copy only if some are missing."""
    missing = rows - h.shape[0]
    return F.pad(h, (0, 0, 0, missing)) if missing else h


def rank_block(rank: int, dtype: torch.dtype) -> int:
    """How much of an adapter's rank is multiplied at a time: more would not fit beside the tile."""
    power: Any = triton.next_power_of_2(rank)
    return min(max(16, power), 64 // dtype.itemsize)


class Tiles:
    """What kernels that compute tiles of logits of the scored rows take for `logits_tile`.

    Args:
        hidden, rows, head: as everywhere.
        lora_h: the adapter's inner product, if there is an adapter.
        config: of the tiles, for their operands.
    """

    def __init__(
        self, hidden: Tensor, rows: Tensor, head: LMHead, lora_h: Tensor | None, config: TileConfig | None = None
    ) -> None:
        weight = head.weight
        lora_b, rank = weight, 0
        if head.lora is not None:
            lora_b, rank = head.lora[1], head.lora[0].shape[0]
        self._config = config if config is not None and config.described else None
        self._hidden, self._scored = hidden, scored(hidden, rows) if self._config else hidden
        self._weight = WeightSlice(weight, 0)
        self._inputs = TileInputs(
            bias=weight if head.bias is None else head.bias.contiguous(),
            lora_h=weight if lora_h is None else lora_h,
            lora_b=lora_b,
            product=weight,
            V=weight.shape[0],
            D=weight.shape[1],
            stride_ht=hidden.stride(0),
            stride_hd=hidden.stride(1),
            stride_wv=0,
            stride_wd=0,
            weight_first=0,
            stride_bv=lora_b.stride(0),
            stride_br=lora_b.stride(1),
            stride_pt=0,
            stride_pv=0,
            product_first=0,
            logit_scale=head.logit_scale,
            softcap=head.softcap or 1.0,
            inverse_temperature=1.0 / head.temperature,
        )
        self._options = TileOptions(
            RANK=rank,
            BLOCK_R=rank_block(rank, hidden.dtype),
            HAS_SCALE=head.logit_scale != 1.0 or head.temperature != 1.0,
            HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None,
            DESCRIBED=False,
            GIVEN=False,
        )

    def arguments(self, operand: WeightSlice | Product | None = None) -> dict[str, Any]:
        """By name: of tiles that multiply with the weight or a slice that holds their columns, or read a product.

        Where the configuration asks for tensor descriptors, they take the places of hidden states and weight: they name
        contiguous rows of one dtype that begin at multiples of 16 bytes, so scored rows are gathered first; other
        operands keep their pointers.
        """
        hidden: Any = self._hidden
        weight: Any = self._weight.values
        inputs, options, config = self._inputs, self._options, self._config
        if isinstance(operand, Product):
            stride_pt, stride_pv = operand.values.stride()
            inputs = inputs._replace(product=operand.values, stride_pt=stride_pt, stride_pv=stride_pv)
            inputs, options = inputs._replace(product_first=operand.first), options._replace(GIVEN=True)
        else:
            weight, first = operand or self._weight
            inputs = inputs._replace(stride_wv=weight.stride(0), stride_wd=weight.stride(1), weight_first=first)
            if config is not None and describable(self._scored, weight):
                hidden = TensorDescriptor.from_tensor(self._scored, [config.block_t, config.block_d])
                weight = TensorDescriptor.from_tensor(weight, [config.block_v, config.block_d])
                options = options._replace(DESCRIBED=True)
        return {"hidden_ptr": hidden, "weight_ptr": weight, "inputs": inputs, "OPTIONS": options}


def describable(*operands: Tensor) -> bool:
    """Whether tensor descriptors can name the operands."""
    aligned = all(t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == t.data_ptr() % 16 == 0 for t in operands)
    return aligned and len({t.dtype for t in operands}) == 1


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """`exp(x)` in a multiplication and one instruction; results below 2^-126 are 0.

    `tl.exp` keeps subnormal results, at four instructions more.
    """
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh(x):
    """By exponentials, which saturate instead of overflowing; by its series where they would lose digits."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return tl.where(square < 0.0625, series, 1.0 - 2.0 / (1.0 + exp(2.0 * x)))


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
    """fp32 logits `[BLOCK_T, BLOCK_V]` of hidden rows `rows` and weight rows `offs_v`; -inf beyond V.

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
    """`dz` times the derivative of the softcap, if there is one, where it gives the logits `z`; beyond V as it is."""
    if OPTIONS.HAS_SOFTCAP:  # d tanh(u) = 1 - tanh(u)^2
        ratio = tl.where(z == float("-inf"), 0.0, z) * (1.0 / (inputs.softcap * inputs.inverse_temperature))
        dz *= 1.0 - ratio * ratio
    return dz
