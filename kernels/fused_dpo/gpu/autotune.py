"""Opt-in tuning: with `FUSED_DPO_AUTOTUNE=1` the tile shapes are timed on this device once per head shape and dtype.

Off by default, and without effect on filtered gradients, where the rows of a tile are part of the result. Ranks that
tune by themselves may pick different winners, and then sum in different orders: what they compute agrees within
rounding, not bit for bit.
"""

import os
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from fused_dpo.gpu.configs import TileConfig, epilogue_of, tile_config
from fused_dpo.gpu.forward import fused_scan, triton_forward
from fused_dpo.gpu.launch import architecture, on_device
from fused_dpo.head import HeadInputs, LMHead

TUNING_ROWS = 4096
"""Rows of the timed forward: fixed, so that the choice does not depend on the first batch."""

CANDIDATES: dict[int, tuple[TileConfig, ...]] = {
    2: (
        TileConfig(128, 256, 64, num_warps=8, num_stages=3),
        TileConfig(128, 256, 64, num_warps=8, num_stages=4),
        TileConfig(128, 256, 32, num_warps=8, num_stages=4),
        TileConfig(256, 128, 64, num_warps=8, num_stages=3),
        TileConfig(128, 128, 64, num_warps=8, num_stages=3),
        TileConfig(128, 128, 64, num_warps=4, num_stages=4),
        TileConfig(128, 128, 32, num_warps=8, num_stages=4),
        TileConfig(64, 256, 64, num_warps=4, num_stages=4),
    ),
    4: (
        TileConfig(64, 64, 32, num_warps=4, num_stages=3),
        TileConfig(64, 64, 32, num_warps=8, num_stages=3),
        TileConfig(128, 64, 32, num_warps=8, num_stages=3),
    ),
}
"""Tile shapes to try, by bytes an element."""

_tuned: dict[tuple[object, ...], TileConfig] = {}


def choose_config(hidden: Tensor, head: LMHead, *, want_stats: bool) -> TileConfig:
    """Return the reviewed configuration, or the fastest candidate if tuning is asked for and there is a device."""
    epilogue, capability = epilogue_of(head, want_stats=want_stats), architecture(hidden.device)
    if capability == 0 or os.environ.get("FUSED_DPO_AUTOTUNE") != "1":
        return tile_config(capability, hidden.dtype, epilogue)
    key = (hidden.device, hidden.dtype, tuple(head.weight.shape), epilogue)
    if key not in _tuned:
        _tuned[key] = fastest(hidden, head, want_stats=want_stats)
    return _tuned[key]


def fastest(hidden: Tensor, head: LMHead, *, want_stats: bool) -> TileConfig:
    """Time the forward with every candidate on random rows; one that does not compile or fit is passed over."""
    V, D = head.weight.shape
    generator = torch.Generator(hidden.device).manual_seed(0)  # the caller's seeded stream stays as it is
    states = torch.randn(TUNING_ROWS, D, generator=generator, device=hidden.device).to(hidden.dtype)
    target = torch.arange(TUNING_ROWS, device=hidden.device) % V
    rows = torch.arange(TUNING_ROWS, device=hidden.device)
    inputs = HeadInputs(states, target, rows, head, 0)
    times: dict[TileConfig, float] = {}
    for config in CANDIDATES[hidden.dtype.itemsize]:

        def forward(config: TileConfig = config) -> object:
            return triton_forward(inputs, partial(fused_scan, config=config), want_stats=want_stats)

        try:
            with on_device(hidden):  # whose clock is read
                median: Any = triton.testing.do_bench(forward, warmup=20, rep=100, return_mode="median")
        except Exception as error:
            if not does_not_fit(error):
                raise
            continue
        times[config] = median
    if not times:
        raise RuntimeError("no tile shape fits this device; unset FUSED_DPO_AUTOTUNE to use the reviewed table.")
    return min(times, key=times.__getitem__)


def does_not_fit(error: Exception) -> bool:
    """Tell whether an error is due to the tile's shape: of the front end, of a pass, of ptxas or of the launch."""
    errors = triton.runtime.errors
    of_shape = (errors.OutOfResources, errors.PTXASError, triton.compiler.errors.CompilationError)
    return isinstance(error, of_shape) or "PassManager::run failed" in str(error)  # MLIR has no class of its own
