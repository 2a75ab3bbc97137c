"""The reference of a run: what a store or the data has of it is taken and tried, the rest is computed, once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fused_dpo.losses import needs_reference
from fused_dpo_engine.batching.planning import PlannedBatch, build_batch
from fused_dpo_engine.batching.schedule import Schedule
from fused_dpo_engine.config.commands import TrainConfig
from fused_dpo_engine.config.options import ModelOptions
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.model.policy import Policy
from fused_dpo_engine.reference.compare import BROUGHT, STORED, first_that_fit, refuse_apart, score_again
from fused_dpo_engine.reference.kept import Kept
from fused_dpo_engine.reference.keys import scorer_settings
from fused_dpo_engine.reference.scoring import ReferenceLogps, score_reference

TRIED_OF_STORE, TRIED_OF_DATA = 4, 8
"""How many pairs are scored again, at most, before what is known of them is taken."""
_Passes = list[PlannedBatch]


@dataclass
class Side:
    """Training pairs or held-out ones, and what is known of them."""

    pairs: Sequence[TokenPair]
    needed: list[int]
    """Those that the run will see, in that order."""
    passes: _Passes
    """This rank's forward passes over all of `needed`."""
    logps: Tensor
    """fp32 [pairs, 2], NaN where nothing is known yet."""
    brought: Tensor
    """bool [pairs, 2], where the data has brought them."""

    def missing(self) -> list[int]:
        """List the pairs that lack a log-prob."""
        complete = (~self.logps.isnan()).all(1).tolist()
        return [index for index in self.needed if not complete[index]]

    def take(self, logps: Tensor) -> Tensor:
        """Take log-probs [pairs, 2] where there are none, and tell where that was."""
        fresh = self.logps.isnan() & ~logps.isnan()
        self.logps = torch.where(fresh, logps, self.logps)
        return fresh


def make_side(pairs: Sequence[TokenPair], needed: list[int], passes: _Passes) -> Side:
    """Make a side of which nothing is known."""
    return Side(pairs, needed, passes, torch.full((len(pairs), 2), torch.nan), torch.zeros(len(pairs), 2).bool())


class RunReference:
    """Reference log-probs of the training pairs and the held-out pairs of a run. Called on all ranks.

    Args:
        schedule: of the run; the training pairs are scored in its first pass over them.
        held_out: pairs to evaluate on, possibly none.
        kept: an open store; None for none.
        console: for reports and progress.
        ranks: processes that share the pairs.
        take_brought: take log-probs that the data brings, where the store has none.

    Raises:
        UserError: the store is damaged.
    """

    def __init__(
        self,
        schedule: Schedule,
        held_out: Sequence[TokenPair],
        kept: Kept | None,
        console: Console,
        ranks: Ranks,
        *,
        take_brought: bool,
    ) -> None:
        self.schedule, self.kept, self.console, self.ranks = schedule, kept, console, ranks
        steps = list(schedule.first_pass())
        seen = [index for step in steps for index in step.indices]
        self.training = make_side(schedule.pairs, seen, [planned for step in steps for planned in step.batches])
        self.held_out = make_side(held_out, list(range(len(held_out))), schedule.plan_share(held_out))
        self.sides = (self.training, self.held_out)
        if kept is not None:
            for side in self.sides:
                side.take(kept.look_up(side.pairs))
            self._report_found(kept)
        if take_brought:
            for side in self.sides:
                nothing = (math.nan, math.nan)
                values = [pair.reference or nothing for pair in side.pairs]
                side.brought = side.take(torch.tensor(values, dtype=torch.float32).view(-1, 2))

    @property
    def needs_model(self) -> bool:
        """Whether the reference model is needed: something is missing, or what the data brings has to be tried."""
        return any(side.missing() or side.brought[side.needed].any() for side in self.sides)

    def score(self, policy: Policy, *, beta: float | None = None) -> None:
        """Try what is known against the reference model, and score what is missing.

        Where nothing is known, the passes are those that training takes: its first rewards are exactly 0 then.

        Args:
            policy: holds the reference model, or the policy before its first update.
            beta: of a loss that is ln 2 where policy and reference agree; None for another loss, or another policy.

        Raises:
            UserError: what is known is not of this model, or a log-prob is not a number.
        """
        self._try_stored(policy, beta)
        self._try_brought(policy)
        missing = [side.missing() for side in self.sides]
        if count := sum(map(len, missing)):
            self.console.print(f"reference: log-probs of {count} pairs, once")
        for side, indices in zip(self.sides, missing, strict=True):
            if not indices:
                continue
            whole = len(indices) == len(side.needed)
            passes = side.passes if whole else self.schedule.plan_share(side.pairs, indices)
            batches = (build_batch(side.pairs, planned.indices, self.schedule.packing) for planned in passes)
            total = sum(len(planned.indices) for planned in passes)
            progress = self.console.is_terminal and self.ranks.is_main
            keep = None if self.kept is None else partial(self.kept.keep, side.pairs)
            side.take(score_reference(policy, side.pairs, batches, total, progress, self.ranks, keep).logps)

    def finish(self) -> tuple[ReferenceLogps, ReferenceLogps]:
        """Close the store, and give the log-probs of the training pairs and of the held-out pairs."""
        if self.kept is not None:
            if self.kept.apart > max(STORED.values()):
                self.console.print(
                    f"warning: another run has written the same sequences to {self.kept.path} meanwhile, and its "
                    f"log-probs differ by more than rounding explains; fused-dpo reference --verify tells whose hold"
                )
            self.kept.finish()
        return ReferenceLogps(self.training.logps), ReferenceLogps(self.held_out.logps)

    def say_not_loaded(self) -> None:
        """Say that what is known is taken untried."""
        self.console.print(
            "reference: the model is not loaded, as nothing is missing, so its log-probs are not computed again here; "
            "fused-dpo reference --verify does that"
        )

    def _report_found(self, kept: Kept) -> None:
        needed = sum(len(side.needed) for side in self.sides)
        lacking = sum(len(side.missing()) for side in self.sides)
        self.console.print(f"reference store {kept.path}: {needed - lacking} of {needed} pairs found")
        if lacking == needed and (others := kept.others()):
            self.console.print(f"of this model it has {'; '.join(others)}")

    def _try_stored(self, policy: Policy, beta: float | None) -> None:
        side = self.training
        stored = (~side.logps.isnan() & ~side.brought).all(1).tolist()
        known = [index for index in side.needed if stored[index]]
        packing = self.schedule.packing
        tried = first_that_fit(side.pairs, known, TRIED_OF_STORE, packing)
        if self.kept is None or not tried:
            return
        found = score_again(policy, side.pairs, tried, side.logps, packing)
        worst = max(found.values(), key=lambda difference: difference.size)
        line = f"reference store: {len(found)} sequences computed again, at most {worst.size:.2g} nat apart"
        if beta is not None:
            signed = {key: difference.now - difference.before for key, difference in found.items()}
            losses = [np.logaddexp(0, -beta * (signed[index, 0] - signed[index, 1])) for index in tried]
            line += f"; their loss is within {abs(np.mean(losses) - math.log(2)):.1e} of ln 2"
        self.console.print(line)
        refuse_apart(
            found.values(),
            STORED[policy.compute_dtype.itemsize],
            f"reference store {self.kept.path} has other log-probs than this model gives; its entries may come from a "
            f"damaged model or machine. Give another --reference-store, which is filled anew",
        )

    def _try_brought(self, policy: Policy) -> None:
        random = np.random.default_rng(self.schedule.run.seed)
        for side in self.sides:
            brought = side.brought.any(1).tolist()
            known = [index for index in side.needed if brought[index]]
            tried = [known[at] for at in random.permutation(len(known))[:TRIED_OF_DATA].tolist()]
            if not tried:
                continue
            theirs = side.logps.masked_fill(~side.brought, torch.nan)
            found = score_again(policy, side.pairs, tried, theirs, self.schedule.packing)
            worst = max(found.values(), key=lambda difference: difference.size)
            self.console.print(
                f"reference: log-probs of {len(known)} pairs from the data's columns; {len(found)} computed again, at "
                f"most {worst.size:.2g} nat apart"
            )
            refuse_apart(
                found.values(),
                BROUGHT,
                "the columns of reference log-probs are not of this model, of these tokens, or not sums over tokens; "
                "--reference-columns never computes them anew",
            )


def find_references(
    config: TrainConfig,
    frozen: ModelOptions | None,
    device: torch.device,
    strategy: str,
    schedule: Schedule,
    held_out: Sequence[TokenPair],
    console: Console,
    ranks: Ranks,
) -> RunReference | None:
    """Find what is known of a run's reference, before any model is loaded; None for a loss that takes none.

    Args:
        config: the run's settings, automatic choices made.
        frozen: the reference, if it is a model of its own.
        device: that the run computes on.
        strategy: see `choose_strategy`.
        schedule, held_out, console, ranks: see `RunReference`.

    Raises:
        UserError: the store cannot be used, or the weights of the reference cannot be read.
    """
    if not needs_reference(config.loss.loss_type):
        return None
    options, kept = config.reference, None
    if options.reference_store is not None:
        settings = partial(
            scorer_settings,
            frozen or config.model,
            config.lora,
            device,
            frozen=frozen is not None,
            packing=config.packing.packing,
            strategy=strategy,
        )
        kept = Kept(options.reference_store, settings, config.loss.ld_alpha, ranks, console)
    plain = config.loss.ld_alpha in (None, 1.0)  # columns are sums in which every token counts the same
    take_brought = options.reference_columns == "auto" and plain
    return RunReference(schedule, held_out, kept, console, ranks, take_brought=take_brought)
