"""How processes hold the model between them: the base, which is one process alone, and the choice."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fused_dpo_engine.distributed.ranks import Ranks


class Strategy:
    """One process that holds the whole model."""

    name = "one process"
    weights_are_shared_out = False
    """Whether reading the weights takes all ranks."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        """What is called in training."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Enclose forward and backward of a micro-batch; gradients are added up over ranks in a step's last."""
        return nullcontext()

    def gathered(self) -> AbstractContextManager[Any]:
        """Let parts of the module be called beside it within the block, on all ranks, after a call of the module."""
        return nullcontext()

    def whole_weights(self, model: nn.Module, *, trained_alone: bool) -> dict[str, Any] | None:
        """Gather the weights of a model to be saved, on rank 0 and on the host; None if it holds them itself.

        Args:
            model: in the module, on all ranks.
            trained_alone: leave frozen weights out.
        """
        return None


def choose_strategy(wanted: str, ranks: Ranks, *, offload: bool) -> str:
    """Choose how the model is held: "one process", "ddp" or "fsdp2".

    Args:
        wanted: one of the last two, or "auto".
        ranks: the processes.
        offload: keep weights and optimizer on the host, which is FSDP2's.
    """
    if offload:
        return "fsdp2"
    if ranks.data_size == 1:
        return "one process"
    return "ddp" if wanted == "auto" else wanted


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Clip gradients, whole ones or shards, to a 2-norm over all of them, and return what it was."""
    norm: Any = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
