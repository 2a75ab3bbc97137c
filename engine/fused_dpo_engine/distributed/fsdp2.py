"""fully_shard: every rank holds its share of each weight, its gradient and optimizer state."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from fused_dpo_engine.distributed.ranks import DATA, Ranks
from fused_dpo_engine.distributed.strategy import Strategy
from fused_dpo_engine.distributed.weights import whole_weights


class Sharded(Strategy):
    """A model whose weights are gathered a layer at a time, when the layer computes.

    Layers compute in `layer_dtype`, from weights that are rounded to it before they are gathered; gradients are reduced
    and weights updated in their own dtype, fp32. What autocast keeps in fp32 stays so, the stream between layers too:
    inputs are not cast. All else is gathered as it is: the embeddings while they compute, the head from its call until
    its backward pass is over, and the rest, with embeddings and head that share a weight, from the beginning until all
    is over.

    Args:
        module: the same on all ranks, on the host or the device; its shares are moved to the mesh's device.
        layers: its parts to be gathered one by one.
        ends: layers of input embeddings and head; None where they are tied.
        ranks: the processes; a process group is needed for one too.
        layer_dtype: half precision to gather layers in; None for the dtype of the weights.
        offload: keep shards and optimizer state on the host.
        reduces_every_pass: add gradients up in shares, by a reduction in every pass of a step, and not whole until the
            last: 4 bytes a trained weight less, for as much to send in every pass.
    """

    name = "FSDP2"
    weights_are_shared_out = True

    def __init__(
        self,
        module: nn.Module,
        layers: Iterable[nn.Module],
        ends: tuple[nn.Module, nn.Module] | None,
        ranks: Ranks,
        layer_dtype: torch.dtype | None,
        *,
        offload: bool,
        reduces_every_pass: bool,
    ) -> None:
        assert ranks.mesh is not None
        common: dict[str, Any] = {
            "mesh": ranks.mesh[DATA],
            "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy(),
        }
        in_layers = MixedPrecisionPolicy(layer_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in layers:
            fully_shard(layer, mp_policy=in_layers, **common)
        # Until a backward pass it stays gathered: the head, as that follows at once, and so does the root by itself.
        self._staying: list[Any] = [module]
        if ends is not None:  # or else they have to be in one unit, the root: a weight has one
            embeddings, head = ends
            unit: Any = fully_shard(embeddings, mp_policy=whole, **common)
            # The gradient of a table is told by the ids; adapters on one compute with their weights.
            unit.set_unshard_in_backward(not isinstance(embeddings, nn.Embedding))
            self._staying.append(fully_shard(head, mp_policy=whole, reshard_after_forward=False, **common))
        fully_shard(module, mp_policy=whole, **common)
        # Without a backward pass their parameters would not be the shards any more.
        module.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else self._reshard())
        super().__init__(module)
        self._reduces_every_pass = reduces_every_pass
        self.in_estimate = {"strategy": "fsdp2", "gpus": ranks.data_size, "offload": offload}
        self.in_estimate |= {"reduces_every_pass": reduces_every_pass}

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Let gradients add up unsharded until the last, unless they are reduced in every pass."""
        self.module.set_requires_gradient_sync(last or self._reduces_every_pass)
        # In what it takes for the last one it lets go of the buffer that it has reduced last: embeddings' gradients.
        self.module.set_is_last_backward(last or self._reduces_every_pass)
        return nullcontext()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold head and root unit whole within the block; layers and embeddings come and go with their calls."""
        for unit in self._staying:
            unit.unshard()
        try:
            yield
        finally:
            self._reshard()

    def _reshard(self) -> None:
        for unit in self._staying:
            unit.reshard()

    def whole_weights(self, model: nn.Module, *, trained_alone: bool) -> dict[str, Any]:
        """Gather the weights; empty on ranks other than 0."""
        return whole_weights(model, trained_alone=trained_alone)
