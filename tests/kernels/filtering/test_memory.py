"""Memory of the filtered mode: the peak of forward and backward against the documented bound."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fused_dpo.streaming.screener import BLOCK_ROWS
from tests.kernels.support.allocations import MIB, allocations_of
from tests.kernels.support.filtered import UNITS, coarse_only, filtered_tokens, vocabulary_problem

pytestmark = pytest.mark.cpu_units


class Footprint(NamedTuple):
    """MiB beyond the results, and what the docstring allows."""

    used: float
    bound: float


def footprint(
    lengths: Sequence[int], V: int, D: int, mib: int, *, gradient: bool, stats: Sequence[str] = ()
) -> Footprint:
    problem = vocabulary_problem(lengths, D, V).map(lambda t: t.requires_grad_(gradient))

    def run() -> tuple[Tensor, ...]:
        result = filtered_tokens(problem, stats, workspace_mib=mib)
        if not gradient:
            return (result.logps,)
        return torch.autograd.grad(result.logps.sum(), (problem.hidden, problem.weight))

    run()  # caches of the first call
    found = allocations_of(run)
    T = sum(lengths)
    blocks = -(-T // BLOCK_ROWS) + len(lengths)
    # Workspace (and a tenth for what a conversion needs for a moment) with 32 rows of logits and probabilities at
    # least, rows' state, screen, kept columns, accumulator.
    smallest = 32 * V * 2 * (2 if UNITS else 4) / MIB
    bound = 1.1 * mib + max(smallest - mib / 2, 0) + 200 * T / MIB
    bound += (2 + gradient) * blocks * V / MIB + 4 * T * D / MIB * gradient
    return Footprint(found.peak - found.kept, bound)


FITS = [(64, 128), (576, 128), *(pytest.param(64, mib, marks=coarse_only) for mib in (32, 16))]
"""In fp32 32 rows of logits and probabilities at this vocabulary are 12 MiB."""


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("D", "mib"), FITS)
def test_peak_is_bounded(D: int, mib: int, gradient: bool) -> None:
    """At a vocabulary of 49152: 400 rows of logits alone would be 38 MiB, and with probabilities in fp32 150."""
    used, bound = footprint((300, 100), 49152, D, mib, gradient=gradient)
    assert used <= bound, f"{used:.1f} MiB beyond the results, bound {bound:.1f}"


def test_peak_with_statistics_is_bounded() -> None:
    used, bound = footprint((300,), 49152, 64, 128, gradient=False, stats=["entropy"])
    assert used <= bound, f"{used:.1f} MiB beyond the results, bound {bound:.1f}"


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_peak_of_a_workspace_that_is_too_small_for_a_block(gradient: bool) -> None:
    """32 rows are held at least, as the option says: here 6 MiB in bf16, of 4."""
    used, bound = footprint((100,), 49152, 64, 4, gradient=gradient)
    assert used <= bound, f"{used:.1f} MiB beyond the results, bound {bound:.1f}"
    assert not gradient or used < 32 * 49152 * 2 * 4 / MIB + 4  # of 100 rows they were 19 MiB


def test_peak_of_many_short_sequences() -> None:
    """600 blocks of two rows."""
    used, bound = footprint((2,) * 600, 20000, 16, 16, gradient=True)
    assert used <= bound, f"{used:.1f} MiB beyond the results, bound {bound:.1f}"
