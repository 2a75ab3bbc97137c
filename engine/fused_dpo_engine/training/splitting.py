"""Forward passes for which memory runs out: the step begins anew, with each of them in two."""

import gc
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fused_dpo_engine.batching.planning import PlannedBatch, halve
from fused_dpo_engine.config.options import PackingOptions
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.errors import OutOfMemoryError

Result = TypeVar("Result")


class Splitting:
    """Splits forward passes in two that have as many slots as one for which memory ran out, or more.

    A split is made where it changes a step's result by rounding alone: between pairs, but not within a ranking, and
    only if `allowed`. What memory holds at a time is a matter of slots, so a size that has failed once is not tried
    again.

    Args:
        pairs: all pairs, to which the batches' indices refer.
        packing: how they are laid out.
        allowed: the loss of a step is a sum over pairs, and nobody else counts this process's passes.
    """

    def __init__(self, pairs: Sequence[TokenPair], packing: PackingOptions, *, allowed: bool) -> None:
        self.pairs, self.packing, self.allowed = pairs, packing, allowed
        self.split_above: int | None = None
        """Slots that a forward pass may have, so far as is known; None before any has failed."""

    def attempt(
        self, number: int, batches: Sequence[PlannedBatch], passes: Callable[[list[PlannedBatch]], Result]
    ) -> Result:
        """Take the passes of a step, all of them anew after one that does not fit.

        Args:
            number: of the step, for the warning.
            batches: as they are planned.
            passes: takes them. It is called again after an OutOfMemoryError, and has to forget what it did before.

        Returns:
            What `passes` returns.

        Raises:
            OutOfMemoryError: of a pass that cannot be split.
        """
        while True:
            try:
                return passes(self.split(batches))
            except OutOfMemoryError as error:
                if not self._note(number, batches, error.slots):
                    raise
            # After the clause: the error holds the frames of the pass that failed, and with them all that it had made.
            gc.collect()
            torch.cuda.empty_cache()

    def split(self, batches: Sequence[PlannedBatch]) -> list[PlannedBatch]:
        """Split those that are not expected to fit; one that cannot be split stays as it is."""
        return [part for batch in batches for part in self._parts(batch)]

    def _parts(self, batch: PlannedBatch) -> list[PlannedBatch]:
        if self.split_above is None or batch.slots <= self.split_above:
            return [batch]
        halves = halve(self.pairs, batch, self.packing)
        return halves if len(halves) == 1 else self.split(halves)

    def _note(self, number: int, batches: Sequence[PlannedBatch], slots: int) -> bool:
        """Remember the size of a pass that has failed, if the pass can be split; tell whether it can."""
        failed = [batch for batch in self.split(batches) if batch.slots == slots]
        if not self.allowed or all(len(halve(self.pairs, batch, self.packing)) == 1 for batch in failed):
            return False
        self.split_above = slots - 1
        warnings.warn(
            f"step {number}: out of memory in a forward pass of {slots} tokens. The step begins anew, and passes of so "
            f"many tokens are split in two from here on, which changes no result; a --tokens-per-batch below {slots} "
            f"plans them so.",
            stacklevel=2,
        )
        return True
