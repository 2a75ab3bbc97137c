"""Blocks of rows: the tile whose rows they are, and values by block."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_dpo.gpu.configs import PLAIN, RICH, RICHEST, TileConfig, epilogue_of, tile_config
from fused_dpo.gpu.launch import architecture
from fused_dpo.head import LMHead
from fused_dpo.linalg.sizes import ceil_div


def backward_config(hidden: Tensor, head: LMHead) -> TileConfig:
    """Return the reviewed tile shape of the backward, never a tuned one: its rows are the blocks of the screen."""
    epilogue = RICH if epilogue_of(head) == PLAIN else RICHEST
    return tile_config(architecture(hidden.device), hidden.dtype, epilogue)


def screening_config(hidden: Tensor, head: LMHead, *, want_stats: bool) -> TileConfig:
    """Return the reviewed tile shape of a forward that screens, never a tuned one, for the same reason."""
    epilogue = epilogue_of(head, want_stats=want_stats, screen=True)
    return tile_config(architecture(hidden.device), hidden.dtype, epilogue)


def triton_screen_shape(hidden: Tensor, head: LMHead, rows: int) -> tuple[int, int, int]:
    """Tell the shape of the screen for at most `rows` scored rows."""
    return ceil_div(rows, backward_config(hidden, head).block_t), 2, head.weight.shape[0]


def of_blocks(values: Tensor, blocks: int, block_t: int) -> Tensor:
    """Arrange values of the scored rows [R] as [blocks, block_t], 0 beyond the last row."""
    return F.pad(values, (0, blocks * block_t - values.numel())).view(blocks, block_t)


def block_sizes(R: int, blocks: int, config: TileConfig, device: torch.device) -> Tensor:
    """Count the rows of each block, [blocks]: all have `block_t` but the last."""
    starts = torch.arange(blocks, device=device) * config.block_t
    return (R - starts).clamp(max=config.block_t)
