"""How kernels are launched: the device, the operands of a tile, and what is compiled apart."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_dpo.gpu.configs import TileConfig
from fused_dpo.head import LMHead

OF_BATCH = (
    *("row_index_ptr", "target_ptr", "index_ptr", "picked_ptr", "logps_ptr", "state_ptr", "stats_ptr", "upstream_ptr"),
    *("shared_peak_ptr", "shared_units_ptr", "shared_sums_ptr"),
    *("peak_ptr", "total_ptr", "weighted_ptr", "sum_ptr", "squares_ptr", "tail_ptr", "bound_ptr", "residual_ptr"),
    *("smallest_ptr", "T", "R", "M", "blocks", "first_split", "saved_rows"),
)
"""Names of kernel parameters whose values depend on the batch. Triton is told to compile nothing for these values.

By itself it compiles a kernel anew where an integer is 1 or a multiple of 16, or where a pointer is a multiple of 16
bytes. Two such kernels may lay out their numbers among the threads differently, and sum in different orders. Then a
sequence's log-prob would depend on how many rows there are beside its own. Training would also stop for the compiler at
every new kind of batch.
"""


def named(stem: str, **flags: tuple[str, str]) -> Callable[[Any], str]:
    """Make a function that names a kernel's variants for profilers: the stem, and a word for each flag's value."""

    def name(specialization: Any) -> str:
        words = (words[not specialization.constants.get(flag)] for flag, words in flags.items())
        return "_".join((stem, *filter(None, words)))

    return name


def interpreted() -> bool:
    """Tell whether Triton runs its kernels in Python, on CPU tensors (TRITON_INTERPRET=1 when triton was imported)."""
    return bool(knobs.runtime.interpret)


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
"""How every kernel is compiled: multiplications and additions are fused; otherwise sums have other bits. Left to
itself, Triton decides by its release (3.10 turns fusion off) and by the environment (TRITON_DEFAULT_FP_FUSION)."""


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
    """Walk the weight in slices of `rows` rows in `dtype`: views, or copies that each overwrite the one before.

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
    """Rank of the adapter, 0 without one."""
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
    """Take the scored rows; a copy only if there are others."""
    return hidden if hidden.shape[0] == rows.numel() else hidden[rows]


def padded(h: Tensor, rows: int) -> Tensor:
    """Pad hidden rows `h` [at most rows, D] with zeros to `rows` rows; a copy only if some are missing."""
    missing = rows - h.shape[0]
    return F.pad(h, (0, 0, 0, missing)) if missing else h


def rank_block(rank: int, dtype: torch.dtype) -> int:
    """Choose how much of an adapter's rank is multiplied at a time: more would not fit beside the tile."""
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

    def arguments(self, source: WeightSlice | Product | None = None) -> dict[str, Any]:
        """Give the arguments of a kernel by name.

        Its tiles multiply with the weight, or with a slice of it that has their columns, or they read a product.

        Where the configuration asks for tensor descriptors, they take the places of hidden states and weight: they name
        contiguous rows of one dtype that begin at multiples of 16 bytes, so scored rows are gathered first; other
        operands keep their pointers.
        """
        hidden: Any = self._hidden
        weight: Any = self._weight.values
        inputs, options, config = self._inputs, self._options, self._config
        if isinstance(source, Product):
            stride_pt, stride_pv = source.values.stride()
            inputs = inputs._replace(product=source.values, stride_pt=stride_pt, stride_pv=stride_pv)
            inputs, options = inputs._replace(product_first=source.first), options._replace(GIVEN=True)
        else:
            weight, first = source or self._weight
            inputs = inputs._replace(stride_wv=weight.stride(0), stride_wd=weight.stride(1), weight_first=first)
            if config is not None and describable(self._scored, weight):
                hidden = TensorDescriptor.from_tensor(self._scored, [config.block_t, config.block_d])
                weight = TensorDescriptor.from_tensor(weight, [config.block_v, config.block_d])
                options = options._replace(DESCRIBED=True)
        return {"hidden_ptr": hidden, "weight_ptr": weight, "inputs": inputs, "OPTIONS": options}


def describable(*operands: Tensor) -> bool:
    """Tell whether tensor descriptors can name the operands."""
    aligned = all(t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == t.data_ptr() % 16 == 0 for t in operands)
    return aligned and len({t.dtype for t in operands}) == 1
