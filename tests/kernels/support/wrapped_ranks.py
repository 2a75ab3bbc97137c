"""Gradients of a `LogpsModel` on some ranks: torchrun ... -m tests.kernels.support.wrapped_ranks FILE WAY."""

import sys

import torch
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fused_dpo.integrations import LogpsModel
from tests.kernels.support.tiny_pairs import responses, tiny

PAIRS = 2
"""Of the three that there are, as each rank gets as many."""


def gradients(rank: int, ranks: int, way: str) -> dict[str, torch.Tensor]:
    """Those of a loss over the pairs of this rank: called as a whole, or its module beside DDP."""
    made = responses()
    half = len(made) // 2
    mine = list(range(PAIRS))[rank::ranks]
    rows = [made[i] for i in mine] + [made[half + i] for i in mine]
    width = max(len(p + r) for p, r in rows)
    ids = torch.tensor([p + r + [0] * (width - len(p + r)) for p, r in rows])
    mask = torch.tensor([[1] * len(p + r) + [0] * (width - len(p + r)) for p, r in rows])
    labels = torch.tensor([[-100] * len(p) + r + [-100] * (width - len(p + r)) for p, r in rows])
    model = LogpsModel(tiny())
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    chosen, rejected = (wrapped if way == "whole" else model)(ids, mask, labels).chunk(2)
    (-F.logsigmoid(0.1 * (chosen - rejected)).mean()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    """Write them, of each rank, to FILE.RANK."""
    file, way = sys.argv[1:3]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(gradients(rank, dist.get_world_size(), way), f"{file}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
