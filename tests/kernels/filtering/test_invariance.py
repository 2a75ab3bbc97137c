"""Bits of the filtered mode: the same from run to run, and for a sequence whatever else is in the batch."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_dpo.stats import TokenStats
from fused_dpo.streaming.screener import BLOCK_ROWS
from tests.kernels.support.filtered import (
    UNITS,
    coarse_only,
    exact_of,
    filter_of,
    filtered_tokens,
    judgements,
    vocabulary_problem,
)
from tests.kernels.support.problems import (
    EVERY_FEATURE,
    IGNORE,
    bits_equal,
    compose,
    evaluate,
    leaves,
    make_problem,
    naive_logps,
    present,
    relative_error,
)

pytestmark = pytest.mark.cpu_units

LENGTHS = (1, 2, 31, 33, 64, 129, 0, 200, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_retain_graph_and_run_to_run(dtype: torch.dtype) -> None:
    problem = make_problem((100, 30, 200), 3000, 64, **EVERY_FEATURE).to(dtype).map(lambda t: 2 * t)

    def run() -> tuple[Tensor, list[Tensor], list[Tensor]]:
        fresh = leaves(problem)
        logps, inputs = filter_of(fresh), list(fresh.tensors.values())
        twice = [torch.autograd.grad(logps.sum(), inputs, retain_graph=True) for _ in range(2)]
        return logps.detach(), list(twice[0]), list(twice[1])

    logps, once, twice = run()
    again = run()
    assert all(bits_equal(a, b) for a, b in zip(once, twice, strict=True))
    assert all(bits_equal(a, b) for a, b in zip([logps, *once], [again[0], *again[1]], strict=True))


@coarse_only
@pytest.mark.parametrize(("D", "mib"), [(576, 128), (64, 128), (64, 16)])
def test_batch_composition_under_a_coarse_screen(D: int, mib: int) -> None:
    """A sequence's log-prob has the same bits alone, in any order, padded, among unscored rows, with a gradient."""
    problem = vocabulary_problem(LENGTHS, D)
    options: dict[str, Any] = {"workspace_mib": mib}
    together = filtered_tokens(problem, ["kept_fraction"], **options)
    assert present(together.kept_fraction).mean() < 0.5  # the screen is what is tested
    parts = together.logps.split(list(LENGTHS))
    for order in ([0], [3], [7], [5, 7], [8, 4, 7, 0], list(range(9))[::-1]):
        got = filtered_tokens(compose(problem, order), **options).logps
        assert bits_equal(got, torch.cat([parts[i] for i in order])), f"order {order}"
    S = max(LENGTHS) + 3
    hidden, labels = torch.full((9, S, D), torch.nan, dtype=torch.bfloat16), torch.full((9, S), IGNORE)
    for i, (a, b) in enumerate(problem.spans):
        hidden[i, 2 : 2 + b - a], labels[i, 2 : 2 + b - a] = problem.hidden[a:b], problem.labels[a:b]
    padded = filtered_tokens(replace(problem, hidden=hidden, labels=labels, cu_seqlens=None), **options).logps
    assert bits_equal(padded[labels >= 0], together.logps)
    sums = filter_of(problem, **options)
    assert bits_equal(evaluate(lambda p: filter_of(p, **options), problem).logps, sums)
    assert bits_equal(filtered_tokens(problem, TokenStats._fields, **options).logps, together.logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_batch_composition_under_an_exact_screen(dtype: torch.dtype) -> None:
    problem = vocabulary_problem((1, 40, 129, 3), 64, 20000).to(dtype)
    together = filter_of(problem)
    for order in ([0], [1], [3, 2], [3, 0, 1]):
        assert bits_equal(filter_of(compose(problem, order)), together[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspace_changes_rounding_alone(dtype: torch.dtype) -> None:
    """Blocks of 32 to 128 rows, one to many slices.

    Other blocks keep other columns, so the gradients agree within what the filter may be wrong by, and each is no
    further from the truth than naive bf16.
    """
    problem = vocabulary_problem((140, 3), 32, 30000).to(dtype)
    exact = evaluate(exact_of, problem)
    naive = evaluate(naive_logps, problem.to(torch.bfloat16))
    for mib in (1, 4, 16, 128):
        with judgements() as seen:
            got = evaluate(lambda p: filter_of(p, workspace_mib=mib), problem)  # noqa: B023
        rows = {1: 32, 4: 32, 16: 64 if dtype == torch.bfloat16 and UNITS else 96}
        assert len(seen[0].keep) == -(-140 // rows.get(mib, BLOCK_ROWS)) + 1
        assert seen[0].keep.float().mean() < 0.5
        # fp32 sums of a row in another order; under a coarse screen other columns count as tail.
        assert (got.logps - exact.logps).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-3) * 143
        for name in ("hidden", "weight"):
            truth = present(exact.grads[name]).double()
            assert relative_error(got.grads[name], truth) <= relative_error(naive.grads[name], truth)
