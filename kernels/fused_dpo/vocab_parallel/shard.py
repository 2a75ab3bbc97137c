"""Which rows of a head this rank holds: from sizes, or from DTensors."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fused_dpo.head import LMHead, VocabShard
from fused_dpo.vocab_parallel.collectives import max_over_ranks


def shard_of(head: LMHead) -> VocabShard | None:
    """Find the part of the vocabulary that this rank's rows are; None for a head without a `process_group`.

    Raises:
        ValueError: the group is none, this rank is not in it, or its rows are not those that `vocab_size` gives it.
    """
    if head.process_group is None:
        if head.vocab_size is not None:
            raise ValueError("vocab_size is that of a head split over ranks; give its process_group too, or neither.")
        return None
    if not isinstance(head.process_group, dist.ProcessGroup):
        raise ValueError(
            f"process_group must be a torch.distributed.ProcessGroup, got {type(head.process_group).__name__}; of a "
            f"DeviceMesh it is mesh.get_group(dim)."
        )
    rank, ranks, rows = dist.get_rank(head.process_group), dist.get_world_size(head.process_group), len(head.weight)
    if rank < 0:
        raise ValueError("this rank is not in the head's process_group.")
    size = ranks * rows if head.vocab_size is None else head.vocab_size
    most = -(-size // ranks)
    first = min(rank * most, size)
    expected = min(most, size - first)
    if rows != expected:
        raise ValueError(
            f"rank {rank} of {ranks} holds {rows} rows of a vocabulary of {size}, and should hold {expected} from row "
            f"{first} on, as torch.chunk and DTensors cut it; pad the vocabulary if a rank would hold none."
        )
    return VocabShard(first, size, most, str(head.process_group.group_name))


def local_head(head: LMHead) -> LMHead:
    """Take this rank's rows of a head with a `process_group` whose tensors are DTensors; others are left alone.

    Weight, bias and the adapter's `b` have to be `Shard(0)` over the group, its `a` to be replicated; gradients come
    back as such DTensors.

    Raises:
        ValueError: they are placed otherwise, or over other ranks.
    """
    if head.process_group is None or not any(map(_is_dtensor, head.differentiable)):
        return head
    a, b, scale = head.lora or (None, None, 0.0)
    rows = [_rows_here(name, tensor, head) for name, tensor in (("weight", head.weight), ("bias", head.bias), ("b", b))]
    if _is_dtensor(a):
        a = _checked("a", a, head, "replicated", lambda placement: placement.is_replicate()).to_local()
    weight, bias, b = rows
    assert weight is not None
    lora = None if a is None or b is None else (a, b, scale)
    size = head.weight.shape[0] if _is_dtensor(head.weight) else head.vocab_size
    return LMHead(
        weight, bias, head.logit_scale, head.softcap, head.temperature, lora, head.process_group, vocab_size=size
    )


def check_agreement(shard: VocabShard, hidden: Tensor, target: Tensor) -> None:
    """Find out whether the ranks of a split head were given the same rows, labels and sizes: they would wait for ever,
    or give each other's numbers for their own.

    One more call among the ranks, and a look at its result.

    Raises:
        ValueError: they were not, on every rank.
    """
    places = torch.arange(1, len(target) + 1, device=target.device)
    facts = [
        torch.tensor([len(target), hidden.shape[1], shard.size], device=target.device),
        (target * places).sum()[None],  # in whole numbers, which may wrap around and stay the same for the same labels
    ]
    mine = torch.cat(facts)
    most = max_over_ranks(torch.cat((mine, -mine)), shard)
    highest, lowest = most[: len(mine)].tolist(), (-most[len(mine) :]).tolist()
    for name, low, high in zip(("rows", "hidden dimensions", "tokens", "labels"), lowest, highest, strict=True):
        if low != high:
            numbers = "" if name == "labels" else f", from {low} to {high}"
            raise ValueError(
                f"the ranks that the head is split over disagree about their {name}{numbers}: hidden states and labels "
                f"have to be the same on all of them. To score other sequences on each rank, leave process_group out "
                f"and give each the whole head."
            )


def _is_dtensor(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and type(tensor).__name__ == "DTensor"


def _rows_here(name: str, tensor: Any, head: LMHead) -> Any:
    if not _is_dtensor(tensor):
        return tensor
    checked = _checked(name, tensor, head, "Shard(0)", lambda placement: placement.is_shard(0))
    return checked.to_local()


def _checked(name: str, tensor: Any, head: LMHead, wanted: str, fits: Any) -> Any:
    mesh, placements = tensor.device_mesh, tensor.placements
    group = dist.get_process_group_ranks(head.process_group)
    if mesh.ndim != 1 or mesh.mesh.tolist() != group or not fits(placements[0]):
        raise ValueError(
            f"{name} is a DTensor with placements {placements} over ranks {mesh.mesh.tolist()}; a head split over "
            f"ranks {group} needs it {wanted} over these alone (FSDP2's shards are gathered within the call of the "
            f"head's module)."
        )
    return tensor
