"""Gradients of a model that scores, sharded by FSDP2: torchrun ... -m tests.kernels.support.sharded_ranks FILE."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from fused_dpo.integrations import add_scoring
from tests.kernels.integrations.test_scoring import batch, tiny


def gradients(rows: Sequence[int], *, sharded: bool = False, own_unit: bool = False) -> dict[str, torch.Tensor]:
    """Those of half the sum of log-probs of some rows, by the second of two steps; sharded, over all ranks.

    With `own_unit` the head is sharded as a unit of its own.

    FSDP2 takes the mean over ranks, here two.
    """
    given = {name: values[list(rows)] for name, values in batch().items()}
    labels = given.pop("labels")
    model = tiny().train()
    add_scoring(model)
    for layer in (*model.model.layers, *([model.lm_head] if own_unit else ())) if sharded else ():
        fully_shard(layer)
    wrapped: Any = fully_shard(model) if sharded else model
    for _ in range(2):
        wrapped.zero_grad()
        logps = wrapped(**given, fused_dpo_labels=labels).tokens.logps
        logps.sum().backward()
    whole = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        whole[name] = gradient.full_tensor() if sharded else gradient / 2
    return whole


def main() -> None:
    """Write them, of rank 0, to FILE: with the head in the root unit, and in one of its own."""
    dist.init_process_group("gloo")
    made = [gradients(range(dist.get_rank(), 4, 2), sharded=True, own_unit=own_unit) for own_unit in (False, True)]
    if dist.get_rank() == 0:
        torch.save(made, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
