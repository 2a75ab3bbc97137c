"""What the ranks of a split vocabulary tell each other: maxima, sums, and what the first one knows.

Operators of `torch.library` take no process groups, so they take their names.
"""

from typing import Any

from torch import Tensor
from torch import distributed as dist

from fused_dpo.head import VocabShard

_GROUPS: dict[str, Any] = {}


def name_of(group: Any) -> str:
    """Name a process group, so that it is found again from within an operator."""
    name = str(group.group_name)
    _GROUPS[name] = group
    return name


def max_over_ranks(values: Tensor, shard: VocabShard | None) -> Tensor:
    """Replace `values`, contiguous, by the largest that any rank has; NaN on one rank may be lost. Returns them."""
    if shard is not None and values.numel():
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=_GROUPS[shard.group])
    return values


def sum_over_ranks(values: Tensor, shard: VocabShard | None) -> Tensor:
    """Replace `values`, contiguous, by their sums over all ranks. Returns them."""
    if shard is not None and values.numel():
        dist.all_reduce(values, group=_GROUPS[shard.group])
    return values


def of_first_rank(values: Tensor, shard: VocabShard | None) -> Tensor:
    """Replace `values`, contiguous, by those of the rank that has the first token. Returns them."""
    if shard is not None and values.numel():
        dist.broadcast(values, group=_GROUPS[shard.group], group_src=0)
    return values
