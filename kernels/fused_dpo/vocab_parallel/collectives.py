"""What the ranks of a split vocabulary tell each other: maxima, sums, and what the first one knows.

Operators of `torch.library` take no process groups, so they take their names.
"""

from typing import Any

from torch import Tensor
from torch import distributed as dist

from fused_dpo.head import VocabShard


def group_of(name: str) -> Any:
    """Find the process group of a name, that is of its `group_name`.

    By a function that torch has for its own operators on groups; there is no public one.
    """
    from torch.distributed import distributed_c10d  # which builds of torch without `distributed` lack

    module: Any = distributed_c10d
    return module._resolve_process_group(name)


def max_over_ranks(values: Tensor, shard: VocabShard | None) -> Tensor:
    """Replace `values`, contiguous, by the largest that any rank has; NaN on one rank may be lost. Returns them."""
    if shard is not None and values.numel():
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group_of(shard.group))
    return values


def sum_over_ranks(values: Tensor, shard: VocabShard | None) -> Tensor:
    """Replace `values`, contiguous, by their sums over all ranks. Returns them."""
    if shard is not None and values.numel():
        dist.all_reduce(values, group=group_of(shard.group))
    return values


def of_first_rank(values: Tensor, shard: VocabShard | None) -> Tensor:
    """Replace `values`, contiguous, by those of the rank that has the first token. Returns them."""
    if shard is not None and values.numel():
        dist.broadcast(values, group=group_of(shard.group), group_src=0)
    return values
