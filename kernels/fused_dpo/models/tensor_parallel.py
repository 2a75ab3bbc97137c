"""Recognise heads whose vocabulary transformers' tensor parallelism has split over ranks."""

import inspect
from typing import Any

_MODULE = "transformers.distributed.tensor_parallel"


def is_of_the_plan(forward: Any) -> bool:
    """Tell whether a forward is the one that transformers' tensor parallelism puts into a layer."""
    return getattr(forward, "__module__", None) == _MODULE and hasattr(forward, "__closure__")


def refuse_other_splits(name: str, forward: Any, weight: Any) -> None:
    """Refuse a head that tensor parallelism computes in another way than by rows of the vocabulary.

    Each rank has consecutive rows then, and the layer's own call gathers the logits: `colwise_gather_output`, what the
    plans of transformers give to `lm_head`.

    Args:
        name: of the layer.
        forward: what transformers has put into it.
        weight: its parameter.

    Raises:
        NotImplementedError: naming the way.
    """
    style = inspect.getclosurevars(forward).nonlocals.get("self")
    gathers = getattr(getattr(style, "output_layouts", None), "is_replicate", lambda: False)()
    placements = list(getattr(weight, "placements", ()))
    by_rows = len(placements) == 1 and placements[0].is_shard(0)
    if type(style).__name__ == "ColwiseParallel" and gathers and by_rows:
        return
    raise NotImplementedError(
        f"the head ({name}) is split over ranks by the style {type(style).__name__} of transformers, its weight as "
        f"{placements}, which the fused head does not know; give lm_head the style 'colwise_gather_output' "
        f"in the tp_plan, or leave it out."
    )


def rows_of_this_rank(part: Any) -> Any:
    """Give the rows that this rank has of a split weight or bias: a view, whose gradient arrives in the parameter."""
    return part.to_local() if hasattr(part, "to_local") else part
