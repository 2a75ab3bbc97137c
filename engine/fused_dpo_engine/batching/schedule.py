"""Which pairs every optimizer step sees, and in which forward passes: a function of pairs, settings and seed alone."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import NamedTuple

import numpy as np

from fused_dpo_engine.batching.planning import PlannedBatch, count_rows, plan_pairs, spread_evenly
from fused_dpo_engine.config.options import PackingOptions, RunOptions
from fused_dpo_engine.data.pairs import TokenPair, prompt_groups, ranking_groups


class Step(NamedTuple):
    """One optimizer step as one rank sees it."""

    batches: list[PlannedBatch]
    """This rank's forward passes, as many as on every other rank."""
    indices: list[int]
    """Pairs of the step on all ranks: the loss is their mean."""
    rows: int
    """Rows of all ranks' passes that hold a token."""


class Schedule:
    """The steps of a run.

    Every epoch shuffles the prompts; pairs on one prompt follow each other, so that a forward pass can share it. The
    order is the same with and without packing or prefix sharing. A step takes the next `pairs_per_step` pairs,
    and what is left of a ranking that this would cut, or, with `batches_per_step`, so many full forward passes, planned
    over windows of about `plan_window` pairs.

    Args:
        pairs: all pairs.
        run: number of steps, pairs a step, seed.
        packing: the forward passes.
        num_ranks: processes that share every step.
        rank: which of them.

    Raises:
        ValueError: a pair larger than a forward pass.
    """

    def __init__(
        self,
        pairs: Sequence[TokenPair],
        run: RunOptions,
        packing: PackingOptions,
        *,
        num_ranks: int = 1,
        rank: int = 0,
    ) -> None:
        self.pairs, self.run, self.packing = pairs, run, packing
        self.num_ranks, self.rank = num_ranks, rank
        self._groups = [
            [index for ranking in ranking_groups(pairs, group) for index in ranking]
            for group in prompt_groups(pairs, range(len(pairs)))
        ]
        self._ranked = any(pair.ranking is not None for pair in pairs)
        self.total_steps = run.max_steps or max(1, self._steps_in(run.epochs))

    def __iter__(self) -> Iterator[Step]:
        """Walk all steps of the run, epoch after epoch, planned as they come."""
        return islice(chain.from_iterable(map(self.epoch, count())), self.total_steps)

    def first_pass(self) -> Iterator[Step]:
        """Walk the steps in which the run sees its pairs for the first time."""
        return islice(self.epoch(0), self.total_steps)

    def epoch(self, epoch: int) -> Iterator[Step]:
        """Walk all steps of one pass over the pairs."""
        shuffled = np.random.default_rng((self.run.seed, epoch)).permutation(len(self._groups)).tolist()
        order = [index for group in shuffled for index in self._groups[group]]
        if self.packing.batches_per_step is not None:
            return self._steps_of_batches(order, self.packing.batches_per_step, epoch)
        return map(self._step_of_pairs, self._cut(order))

    def _cut(self, order: list[int]) -> Iterator[list[int]]:
        """Cut an epoch's pairs into steps of `pairs_per_step`."""
        start = 0
        while start < len(order):
            stop = self._edge(order, start + self.run.pairs_per_step)
            yield order[start:stop]
            start = stop

    def _edge(self, order: list[int], at: int) -> int:
        """Move a place to cut on to the end of the ranking that lies there."""
        while 0 < at < len(order):
            here, before = (self.pairs[index].ranking for index in (order[at], order[at - 1]))
            if here is None or here != before:
                break
            at += 1
        return at

    def _steps_in(self, epochs: float) -> int:
        """Count the steps of so many epochs; of full forward passes or rankings their number differs between epochs."""
        if self.packing.batches_per_step is None and not self._ranked:
            return math.ceil(epochs * math.ceil(len(self.pairs) / self.run.pairs_per_step))
        whole, part = int(epochs), epochs % 1
        steps = sum(len(list(self.epoch(epoch))) for epoch in range(whole))
        return steps + (math.ceil(part * len(list(self.epoch(whole)))) if part else 0)

    def _step_of_pairs(self, indices: list[int]) -> Step:
        batches = self._evenly(plan_pairs(self.pairs, indices, self.packing))
        return Step(batches[self.rank :: self.num_ranks], indices, self._rows(batches))

    def _steps_of_batches(self, order: list[int], batches_per_step: int, epoch: int) -> Iterator[Step]:
        rounds = self._plan_windows(order, epoch)
        for at in range(0, len(rounds), batches_per_step):
            taken = rounds[at : at + batches_per_step]
            batches = [batch for row in taken for batch in row]
            indices = [index for batch in batches if batch.counted for index in batch.indices]
            yield Step([row[self.rank] for row in taken], indices, self._rows(batches))

    def _rows(self, batches: list[PlannedBatch]) -> int:
        return sum(count_rows(self.pairs, batch, self.packing) for batch in batches if batch.counted)

    def _evenly(self, batches: list[PlannedBatch]) -> list[PlannedBatch]:
        return spread_evenly(self.pairs, batches, self.packing, self.num_ranks)

    def plan_share(self, pairs: Sequence[TokenPair], indices: Sequence[int] | None = None) -> list[PlannedBatch]:
        """Plan forward passes over other pairs, or some of them, and take this rank's, as many as every rank has."""
        batches = plan_pairs(pairs, range(len(pairs)) if indices is None else indices, self.packing)
        return spread_evenly(pairs, batches, self.packing, self.num_ranks)[self.rank :: self.num_ranks]

    def _plan_windows(self, order: list[int], epoch: int) -> list[list[PlannedBatch]]:
        """Plan forward passes in rounds of one a rank, alike in size within a round, the rounds of a window shuffled.

        What a window leaves in its emptiest passes goes into the next window, so that only the last can have any.
        """
        windows = max(1, round(len(order) / self.packing.plan_window))
        edges = [self._edge(order, round(len(order) * i / windows)) for i in range(windows + 1)]
        ranks, random = self.num_ranks, np.random.default_rng((self.run.seed, epoch, 1))
        rounds: list[list[PlannedBatch]] = []
        left: list[int] = []
        for window in range(windows):
            batches = plan_pairs(self.pairs, left + order[edges[window] : edges[window + 1]], self.packing)
            batches.sort(key=lambda batch: -batch.slots)
            if window + 1 < windows:
                full = (len(batches) - 1) // ranks * ranks
                left = [index for batch in batches[full:] for index in batch.indices]
                batches = batches[:full]
            else:
                batches = self._evenly(batches)
            here = [batches[at : at + ranks] for at in range(0, len(batches), ranks)]
            rounds += [here[at] for at in random.permutation(len(here)).tolist()]
        return rounds
