"""Tile shapes of the Triton kernels: one reviewed table, chosen by architecture and dtype, never by batch.

A sequence's log-prob must not depend on what else is in the batch, so nothing here looks at the number of rows, and
autotuning is off unless asked for.
"""

from dataclasses import dataclass
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

    @property
    def constants(self) -> dict[str, Any]:
        """As keyword arguments of a kernel launch."""
        return {
            "BLOCK_T": self.block_t,
            "BLOCK_V": self.block_v,
            "BLOCK_D": self.block_d,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


SPLIT_COLUMNS = 8192
"""Vocabulary columns that one program of the forward walks. Fixes the number of partial results per row by V alone."""

# Registers: fp32 accumulators take block_t * block_v / (32 * num_warps) of the 255 a thread has. Shared memory:
# (block_t + block_v) * block_d * itemsize * num_stages, at most 163 KiB on sm_80 and 227 KiB on sm_90.
TILE_CONFIGS: dict[tuple[int, int, bool], TileConfig] = {
    # architecture, bytes an element, whether the epilogue is rich (stats, softcap or adapter: more live registers)
    (90, 2, False): TileConfig(128, 256, 64, num_warps=8, num_stages=3),
    (90, 2, True): TileConfig(128, 128, 64, num_warps=8, num_stages=3),
    (90, 4, False): TileConfig(64, 64, 32, num_warps=4, num_stages=3),
    (90, 4, True): TileConfig(64, 64, 32, num_warps=8, num_stages=3),
    (80, 2, False): TileConfig(128, 128, 32, num_warps=8, num_stages=4),
    (80, 2, True): TileConfig(128, 64, 64, num_warps=8, num_stages=3),
    (80, 4, False): TileConfig(64, 64, 32, num_warps=8, num_stages=3),
    (80, 4, True): TileConfig(64, 64, 32, num_warps=8, num_stages=3),
}
INTERPRETER_CONFIG = TileConfig(16, 32, 16, num_warps=1, num_stages=1)
"""Small tiles, so that small tests cross every edge."""


def tile_config(architecture: int, dtype: torch.dtype, head: LMHead, *, want_stats: bool = False) -> TileConfig:
    """The configuration for compute capability `architecture` (90 for 9.0; 0 for the interpreter) and operand dtype.

    Architectures between two tables take the lower one (8.6, 8.9: sm_80), newer ones the highest.
    """
    if architecture == 0:
        return INTERPRETER_CONFIG
    table = 90 if architecture >= 90 else 80
    rich = want_stats or head.softcap is not None or head.lora is not None
    return TILE_CONFIGS[table, dtype.itemsize, rich]
