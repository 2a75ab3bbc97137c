"""Tile shapes of the Triton kernels: one reviewed table, chosen by architecture and dtype, never by batch.

A sequence's log-prob must not depend on what else is in the batch, so nothing here looks at the number of rows, and
autotuning is off unless asked for.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from fused_dpo.head import LMHead


@dataclass(frozen=True)
class TileConfig:
    """Shape of one program's tile and how it is compiled."""

    block_t: int
    """Scored rows."""
    block_v: int
    """Vocabulary columns."""
    block_d: int
    """Hidden dimensions a step of the accumulation."""
    num_warps: int
    num_stages: int
    """Depth of the software pipeline that loads operands."""
    described: bool = False
    """Whether operands are loaded by tensor descriptors (compute capability 9.0 and later), where they allow it."""
    flattened: bool = False
    """Whether the forward begins to load the next tile's operands while it is still summing up this one. Not for
    triton 3.9, which spills 120 to 216 bytes there."""

    @property
    def narrow(self) -> int:
        """Columns of a narrow block, see NARROW_COLUMNS."""
        return min(NARROW_COLUMNS, self.block_v)

    @property
    def of_rows(self) -> "TileConfig":
        """The tile of rows gathered for a narrow block of columns."""
        return replace(self, block_v=self.narrow)

    def blocks_in_cache(self, row_bytes: int) -> int:
        """Count the row blocks whose hidden states, of so many bytes a row, fit into the L2 cache beside the weight."""
        return max(1, GROUP_MIB * 2**20 // (self.block_t * row_bytes))

    @property
    def constants(self) -> dict[str, Any]:
        """The shape as keyword arguments of a kernel launch."""
        return {
            "BLOCK_T": self.block_t,
            "BLOCK_V": self.block_v,
            "BLOCK_D": self.block_d,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class ProductConfig:
    """Shape of one program's tile in a product with gathered rows; its other side is the block of the lists."""

    block_n: int
    """Hidden dimensions."""
    block_k: int
    """Entries of a list a step of the accumulation."""
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, Any]:
        """The shape as keyword arguments of a kernel launch."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class LibraryConfig:
    """Shape of the products that a library's matmul computes, and of the programs that read them."""

    chunk_rows: int
    """Scored rows: several blocks of a screen."""
    slice_columns: int
    """Vocabulary columns: several splits."""
    split_columns: int
    """Vocabulary columns that one program of the forward walks: several tiles."""
    tile: TileConfig
    """Tile of the forward; its rows are the blocks of a screen. Nothing is multiplied, so `block_d` is not used."""
    dz_tile: TileConfig
    """Tile of the exact backward."""


NARROW_COLUMNS = 64
"""Columns that share the list of rows kept for the weight's gradient."""
HOT_SPLITS = 1
"""Splits that the filtered forward runs once before, to bound the log-sum-exp from below."""
GROUP_MIB = 16
"""Hidden states that programs at work together read, in MiB: a third of the L2 cache of an A100 or H100."""
SPLIT_COLUMNS = 4096
"""Vocabulary columns that one program of the forward walks. Fixes the number of partial results per row by V alone."""

# Registers: fp32 accumulators take block_t * block_v / (32 * num_warps) of the 255 a thread has. Shared memory:
# (block_t + block_v) * block_d * itemsize * num_stages, at most 163 KiB on sm_80 and 227 KiB on sm_90.
# The rows of a tile are the blocks of a screen, so they are the same for all epilogues of an architecture and dtype.
PLAIN, RICH, RICHEST = range(3)
TILE_CONFIGS: dict[tuple[int, int, int], TileConfig] = {
    # architecture, bytes an element, how much the epilogue keeps in registers
    (90, 2, PLAIN): TileConfig(128, 256, 64, num_warps=8, num_stages=3),
    (90, 2, RICH): TileConfig(128, 128, 64, num_warps=8, num_stages=3),
    (90, 2, RICHEST): TileConfig(128, 64, 64, num_warps=8, num_stages=3),
    (90, 4, PLAIN): TileConfig(64, 64, 32, num_warps=4, num_stages=3),
    (90, 4, RICH): TileConfig(64, 64, 32, num_warps=8, num_stages=3),
    (90, 4, RICHEST): TileConfig(64, 64, 32, num_warps=8, num_stages=3),
    (80, 2, PLAIN): TileConfig(128, 128, 32, num_warps=8, num_stages=4),
    (80, 2, RICH): TileConfig(128, 64, 64, num_warps=8, num_stages=3),
    (80, 2, RICHEST): TileConfig(128, 64, 64, num_warps=8, num_stages=3),
    (80, 4, PLAIN): TileConfig(64, 64, 32, num_warps=8, num_stages=3),
    (80, 4, RICH): TileConfig(64, 64, 32, num_warps=8, num_stages=3),
    (80, 4, RICHEST): TileConfig(64, 64, 32, num_warps=8, num_stages=3),
}
PRODUCT_CONFIGS: dict[tuple[int, int], ProductConfig] = {
    # architecture, bytes an element
    (90, 2): ProductConfig(128, 64, num_warps=8, num_stages=3),
    (90, 4): ProductConfig(64, 32, num_warps=4, num_stages=3),
    (80, 2): ProductConfig(128, 32, num_warps=8, num_stages=3),
    (80, 4): ProductConfig(64, 32, num_warps=4, num_stages=3),
}
LIBRARY_CONFIGS: dict[int, LibraryConfig] = {
    # bytes an element; 1024 x 8192 is 256 tiles of 128x256, two waves on 132 multiprocessors, and 32 MiB in fp32
    2: LibraryConfig(1024, 8192, 128, TileConfig(128, 32, 16, 4, 1), TileConfig(128, 64, 16, 8, 1)),
    4: LibraryConfig(1024, 8192, 128, TileConfig(64, 32, 16, 4, 1), TileConfig(64, 64, 16, 8, 1)),
}
INTERPRETER_CONFIG = TileConfig(16, 32, 16, num_warps=1, num_stages=1)
INTERPRETER_PRODUCT = ProductConfig(16, 16, num_warps=1, num_stages=1)
INTERPRETER_LIBRARY = LibraryConfig(32, 128, 64, INTERPRETER_CONFIG, INTERPRETER_CONFIG)
"""Small tiles, so that small tests cross every edge."""


def tile_config(architecture: int, dtype: torch.dtype, epilogue: int) -> TileConfig:
    """Look the tile up for compute capability `architecture` (90 for 9.0; 0 for the interpreter) and operand dtype.

    Architectures between two tables take the lower one (8.6, 8.9: sm_80), newer ones the highest.
    """
    if architecture == 0:
        return INTERPRETER_CONFIG
    return TILE_CONFIGS[90 if architecture >= 90 else 80, dtype.itemsize, epilogue]


def epilogue_of(head: LMHead, *, want_stats: bool = False, screen: bool = False) -> int:
    """Tell how much an epilogue keeps in registers beside the tile, which decides how large the tile may be."""
    if want_stats and screen:
        return RICHEST
    return RICH if want_stats or head.softcap is not None or head.lora is not None else PLAIN


def product_config(architecture: int, dtype: torch.dtype) -> ProductConfig:
    """Look the tile up of products with gathered rows; arguments as in `tile_config`."""
    if architecture == 0:
        return INTERPRETER_PRODUCT
    return PRODUCT_CONFIGS[90 if architecture >= 90 else 80, dtype.itemsize]


def library_config(architecture: int, dtype: torch.dtype) -> LibraryConfig:
    """Look the shapes up of products that a library computes; arguments as in `tile_config`."""
    return INTERPRETER_LIBRARY if architecture == 0 else LIBRARY_CONFIGS[dtype.itemsize]
