"""Who sees whom in a packed row: segments, and what kernels take to follow them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Segment(NamedTuple):
    """Rows of a packed row that attend causally to the first `shared` rows of their trunk, then to themselves."""

    start: int
    stop: int
    trunk: int
    """Number of the segment whose rows are shared; its own where nothing is."""
    shared: int


@dataclass(eq=False)  # not frozen: of those torch 2.11 compiles in every field, and the segments with them
class AttentionPlan:
    """Who sees whom in a packed row of T tokens and N segments; handed to every attention layer of the model.

    A variable-length attention call with offsets of its own for queries and keys, causal and aligned bottom-right.
    """

    segments: tuple[Segment, ...]
    """Segments in the order of the row, without gaps. What is compiled must not look at them: `torch.compile` would
    compile it anew for every number of segments."""
    num_rows: int
    """T."""
    cu_q: Tensor = field(repr=False)
    """int32 [N+1], offsets of the segments' queries in the row."""
    cu_k: Tensor = field(repr=False)
    """int32 [N+1], offsets of the segments' keys among the gathered keys."""
    max_q: int
    """Queries of the longest segment."""
    max_k: int
    """Keys of the longest segment."""
    kv_index: Tensor | None = field(repr=False)
    """int64 [K], the row of each gathered key; None where nothing is shared, and the keys are the row itself."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "AttentionPlan":
        """Move the plan's tensors to `device`."""
        cu_q, cu_k = (offsets.to(device, non_blocking=non_blocking) for offsets in (self.cu_q, self.cu_k))
        kv_index = None if self.kv_index is None else self.kv_index.to(device, non_blocking=non_blocking)
        return replace(self, cu_q=cu_q, cu_k=cu_k, kv_index=kv_index)


def plan_attention(segments: Sequence[Segment]) -> AttentionPlan:
    """Plan the attention of at least one segment."""
    queries = [segment.stop - segment.start for segment in segments]
    keys = [length + segment.shared for length, segment in zip(queries, segments, strict=True)]
    kv_index = None
    if any(segment.shared for segment in segments):
        rows = []
        for start, stop, trunk, shared in segments:
            first = segments[trunk].start
            rows += [np.arange(first, first + shared), np.arange(start, stop)]
        kv_index = torch.from_numpy(np.concatenate(rows))
    offsets = offsets_of(queries), offsets_of(keys)
    return AttentionPlan(tuple(segments), sum(queries), *offsets, max(queries), max(keys), kv_index)


def offsets_of(lengths: Sequence[int]) -> Tensor:
    """Return int32 [N+1], where each of N runs of such lengths begins, and where the last one ends."""
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
