"""DistributedDataParallel: every rank holds the whole model, and gradients are averaged."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fused_dpo_engine.distributed.ranks import DATA, Ranks
from fused_dpo_engine.distributed.strategy import Strategy

_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"
"""Since torch 2.13, and before."""


class Replicated(Strategy):
    """A model that every rank holds.

    Args:
        module: the same on all ranks, which get rank 0's weights.
        ranks: the processes.
    """

    name = "DDP"

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        assert ranks.mesh is not None
        settings: dict[str, Any] = {_SYNC_BUFFERS: False}  # nothing here changes them
        wrapped = DistributedDataParallel(
            module,
            process_group=ranks.mesh[DATA].get_group(),
            gradient_as_bucket_view=True,  # half the memory that gradients take otherwise
            **settings,
        )
        super().__init__(wrapped)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Let gradients add up on each rank, until the last."""
        return nullcontext() if last else self.module.no_sync()
