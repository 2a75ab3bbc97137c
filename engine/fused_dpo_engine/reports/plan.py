"""What a data set costs before any training: `fused-dpo plan`, statistics of the plan and a histogram of the pairs."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Group
from rich.table import Table

from fused_dpo_engine.batching.planning import count_slots
from fused_dpo_engine.batching.schedule import Schedule
from fused_dpo_engine.config.options import PackingOptions, RunOptions
from fused_dpo_engine.data.pairs import TokenPair

BAR = 40
"""Characters of the histogram's longest bar."""


@dataclasses.dataclass(frozen=True)
class PlanStatistics:
    """One pass over the pairs under some options."""

    steps: int
    passes: int
    slots: int
    """Token slots of all forward passes."""
    fill: float
    """Slots over those that tokens-per-batch allows."""
    seconds: float
    """Time it took to plan."""


def plan_statistics(pairs: Sequence[TokenPair], run: RunOptions, packing: PackingOptions) -> PlanStatistics:
    """Plan the first epoch of a run and count."""
    started = time.perf_counter()
    steps = list(Schedule(pairs, dataclasses.replace(run, max_steps=1), packing).epoch(0))
    seconds = time.perf_counter() - started
    batches = [batch for step in steps for batch in step.batches]
    slots = sum(batch.slots for batch in batches)
    return PlanStatistics(len(steps), len(batches), slots, slots / (len(batches) * packing.tokens_per_batch), seconds)


def padded_slots(pairs: Sequence[TokenPair], order: Sequence[int], pairs_per_batch: int) -> int:
    """Count the token slots of padded batches of so many pairs, taken in that order as trainers do."""
    packing = PackingOptions(packing=False)
    starts = range(0, len(order), pairs_per_batch)
    return sum(count_slots(pairs, order[at : at + pairs_per_batch], packing) for at in starts)


def histogram(costs: Sequence[int]) -> Table:
    """Show how many pairs take how many tokens, by powers of two."""
    table = Table(title="tokens that a pair takes")
    for name in ("from", "to", "pairs"):
        table.add_column(name, justify="right")
    table.add_column("")
    exponents = np.floor(np.log2(np.asarray(costs))).astype(int)
    counts = {int(e): int((exponents == e).sum()) for e in range(exponents.min(), exponents.max() + 1)}
    for exponent, count in counts.items():
        bar = "█" * round(BAR * count / max(counts.values()))
        table.add_row(str(2**exponent), str(2 ** (exponent + 1) - 1), str(count), bar)
    return table


def report(pairs: Sequence[TokenPair], run: RunOptions, packing: PackingOptions) -> Group:
    """Make the tables for the console: forward passes as planned, against padded batches, and the histogram."""
    tokens = sum(pair.num_tokens for pair in pairs)
    planned = plan_statistics(pairs, run, packing)
    order = np.random.default_rng(run.seed).permutation(len(pairs)).tolist()
    rows: list[tuple[str, int, int, float | None]] = [
        (f"--no-packing, {count} pairs a batch", padded_slots(pairs, order, count), -(-len(pairs) // count), None)
        for count in (4, 16)
    ]
    plain = dataclasses.replace(packing, packing=True, batches_per_step=packing.batches_per_step or 1)
    for name, sharing in (("packed, prefixes not shared", False), ("packed, prefixes shared", True)):
        full = plan_statistics(pairs, run, dataclasses.replace(plain, prefix_sharing=sharing))
        rows.append((f"{name}, full forward passes", full.slots, full.passes, full.fill))

    table = Table(title=f"{len(pairs)} pairs, {tokens} tokens, at most {packing.tokens_per_batch} in a forward pass")
    for name in ("", "token slots", "of the tokens", "times these settings", "forward passes", "fill"):
        table.add_column(name, justify="right" if name else "left")
    of_steps = f"{packing.batches_per_step} full passes" if packing.batches_per_step else f"{run.pairs_per_step} pairs"
    rows.append((f"these settings, {planned.steps} steps of {of_steps}", planned.slots, planned.passes, planned.fill))
    for name, slots, passes, fill in rows:
        ratio, of_tokens = f"{slots / planned.slots:.2f}", f"{slots / tokens:.2f}"
        table.add_row(name, str(slots), of_tokens, ratio, str(passes), "" if fill is None else f"{fill:.1%}")
    table.caption = f"planned in {planned.seconds:.2f} s"
    return Group(table, histogram([count_slots(pairs, [index], packing) for index in range(len(pairs))]))
