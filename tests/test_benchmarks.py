"""The benchmarks measure what they say, on small problems."""

import pytest
import torch

from benchmarks.head import load_problem, measure, truth
from benchmarks.measure import environment, isolated, peak_growth_mib, timed


def allocate(mib: int) -> int:
    return len(bytearray(mib * 2**20))


def grow(mib: int) -> float:
    return peak_growth_mib(lambda: allocate(mib))[1]


@pytest.mark.parametrize("mib", [50, 200])
def test_peak_growth(mib: int) -> None:
    """What was allocated and freed again, in a process of its own."""
    assert isolated(grow, mib) == pytest.approx(mib, abs=10)


def test_timed() -> None:
    result, seconds = timed(lambda: sum(range(1000)))
    assert result == 499500
    assert 0 < seconds < 1


def test_environment_names_what_a_result_belongs_to() -> None:
    assert environment()["torch"] == torch.__version__
    assert all(environment().values())


def test_head_benchmark_tells_the_implementations_apart() -> None:
    """bf16 logits are off by what bf16 rounds, ours by a hundredth of it or less."""
    problem = load_problem(None, 112)
    reference = truth(problem)
    naive, ours = (measure(name, None, 112, 1, reference) for name in ("naive bf16", "exact"))
    assert naive["tokens"] == ours["tokens"] == 112
    assert ours["worst_logp_error_nat"] < naive["worst_logp_error_nat"] / 100
    assert ours["dhidden_error"] < naive["dhidden_error"]
    assert min(ours["forward_s"], ours["backward_s"]) > 0
