"""How processes hold the model between them: the base, which is one process alone, and the choice."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

from torch import nn

from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.distributed.weights import whole_weights
from fused_dpo_engine.errors import UserError


class Strategy:
    """One process that holds the whole model."""

    name = "one process"
    weights_are_shared_out = False
    """Whether reading the weights takes all ranks."""
    in_estimate: Mapping[str, Any] = MappingProxyType({})
    """What of it decides about memory, as arguments of `fused_dpo_engine.analysis.memory.estimate_memory`."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        """The policy, or what is wrapped around it: training calls this, so that gradients are reduced."""

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


class Split(Strategy):
    """A model whose layers and vocabulary are split over ranks that share the same pairs (tensor parallelism)."""

    name = "tensor parallelism"
    weights_are_shared_out = True

    def whole_weights(self, model: nn.Module, *, trained_alone: bool) -> dict[str, Any]:
        """Gather the weights; empty on ranks other than 0."""
        return whole_weights(model, trained_alone=trained_alone)


def choose_strategy(wanted: str, ranks: Ranks, *, offload: bool, whole_fits: Callable[[], bool]) -> str:
    """Choose how the model is held by ranks that have other pairs: "one process", "ddp" or "fsdp2".

    Args:
        wanted: one of the last two, or "auto".
        ranks: the processes.
        offload: keep weights and optimizer on the host, which is FSDP2's.
        whole_fits: tells whether a device holds all of it, which decides for "auto".

    Raises:
        UserError: DDP of a model that is split besides.
    """
    if offload:
        return "fsdp2"
    if ranks.data_size == 1:
        return "one process"
    if ranks.tensor_parallel > 1 and wanted == "ddp":
        raise UserError(
            f"--strategy ddp holds no model that is split besides: take fsdp2, or no more processes than "
            f"--tensor-parallel {ranks.tensor_parallel}."
        )
    if wanted == "auto":
        return "ddp" if ranks.tensor_parallel == 1 and whole_fits() else "fsdp2"
    return wanted
