"""Runs whose numbers are no longer finite: which weights, which pairs, and what is on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from fused_dpo import LossOutput
from fused_dpo_engine.batching.batch import PairBatch
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.errors import TrainingDivergedError
from fused_dpo_engine.model.finite import first_not_finite

_SHOWN = 8
"""Pairs that a message names."""


def broken_weight(model: nn.Module, ranks: Ranks, *, together: bool = True) -> str | None:
    """Name a trained weight that holds an infinity or a NaN on any rank; None if all are finite.

    Args:
        model: whose weights are looked at; of shares of them every rank looks at its own.
        ranks: the processes.
        together: all of them call it, and get the same answer.
    """
    found = first_not_finite((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    return next(filter(None, ranks.gather_objects(found) if together else [found]), None)


def error_of_update(step: int, broken: str, output: Path, saved: Mapping[str, str]) -> TrainingDivergedError:
    """Make the error for weights that updates have left without numbers, which are not worth saving.

    Args:
        step: the last one.
        broken: what `broken_weight` says.
        output: the run's folder.
        saved: `Summary.saved`, which tells what is in it.
    """
    kept = [f"{output / name} has the weights {when}" for name, when in saved.items() if when.startswith("after")]
    return TrainingDivergedError(
        step,
        f"after its update numbers of {broken} are not finite: training has diverged. These weights are not saved; "
        f"{' and '.join(kept) or 'nor were any before them (--save-steps)'}. A lower --learning-rate usually helps.",
    )


def error_of_step(
    step: int,
    metrics: Mapping[str, float],
    outputs: Sequence[tuple[PairBatch, LossOutput]],
    pairs: Sequence[TokenPair],
    output: Path,
    ranks: Ranks,
) -> TrainingDivergedError:
    """Make the error for a loss or gradient that is not finite, computed from weights that are; on all ranks.

    Args:
        step: in which it is.
        metrics: of the step.
        outputs: its batches on this rank, and the losses of their pairs.
        pairs: all pairs.
        output: the run's folder.
        ranks: the processes.
    """
    here = [
        pairs[batch.pair_indices[i]].where
        for batch, losses in outputs
        for i in (~losses.losses.isfinite()).nonzero().flatten().tolist()
    ]
    culprits = list(dict.fromkeys(place for share in ranks.gather_objects(here) for place in share))
    more = f" and {len(culprits) - _SHOWN} more" if len(culprits) > _SHOWN else ""
    where = f"pairs {', '.join(culprits[:_SHOWN])}{more}" if culprits else "the gradient alone"
    return TrainingDivergedError(
        step,
        f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: training has diverged, in {where}. The weights "
        f"before this step are in {output / 'model'}. A lower --learning-rate or --dtype float32 usually helps.",
    )
