"""Two ranks that take steps of 8-bit AdamW on the shards of FSDP2; what comes out is written by the first of them."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fused_dpo_engine.config.options import OptimizerOptions
from fused_dpo_engine.training.optimizer import build_optimizer

STEPS = 4
SHAPES = ((64, 256), (256, 64), (1, 8192))
"""Of matrices: a rank's half of the first two begins at a block of 256 numbers, and the last one leaves a rank none."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(columns, rows) for rows, columns in SHAPES])


def train(model: nn.Module) -> dict[str, torch.Tensor]:
    """Take steps along gradients that follow from the weights alone, and give the weights."""
    options = OptimizerOptions(learning_rate=1e-2, optimizer="adamw8bit", weight_decay=0.1, warmup_ratio=0.0)
    optimizer, _ = build_optimizer(model.parameters(), options, STEPS)
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().sin()
        optimizer.step()
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in model.named_parameters()}


def main(path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = network()
    fully_shard(model)
    weights = train(model)
    if dist.get_rank() == 0:
        torch.save(weights, path)
    dist.barrier()
    dist.destroy_process_group()
    # Without Python's shutdown, in which a thread below the process group has once ended a rank by SIGABRT.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
