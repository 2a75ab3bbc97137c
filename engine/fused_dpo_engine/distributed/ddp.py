"""DistributedDataParallel: every rank holds the whole model, and gradients are averaged."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fused_dpo_engine.distributed.ranks import DATA, Ranks
from fused_dpo_engine.distributed.strategy import Strategy


class Replicated(Strategy):
    """A model that every rank holds.

    Args:
        module: the same on all ranks, which get rank 0's weights.
        ranks: the processes.
    """

    name = "DDP"

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        assert ranks.mesh is not None
        super().__init__(
            DistributedDataParallel(
                module,
                process_group=ranks.mesh[DATA].get_group(),
                broadcast_buffers=False,  # nothing here changes them
                gradient_as_bucket_view=True,  # half the memory that gradients take otherwise
            )
        )

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Let gradients add up on each rank, until the last."""
        return nullcontext() if last else self.module.no_sync()
