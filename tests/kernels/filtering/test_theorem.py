"""The theorem of `fused_dpo.filtering` on drawn distributions, targets and upstream gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.support.filtered import EPS, GUARD, coarse_only, filter_of, judgements, one_sequence
from tests.kernels.support.probe import COARSE_FACTOR, UPSTREAMS, Draw, assert_within_theorem, peaked, probe
from tests.kernels.support.problems import evaluate, naive_logits

pytestmark = pytest.mark.cpu_units


@st.composite
def draws(draw: Callable) -> Draw:
    """Rows from flat to one-hot, alike or not, with likely or random targets."""
    lengths = draw(st.lists(st.sampled_from([1, 2, 7, 40, 130]), min_size=1, max_size=4))
    V = draw(st.sampled_from([3, 64, 130, 300]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    R = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    def choice(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[torch.randint(0, len(values), (R, 1), generator=rng)]

    alike = draw(st.sampled_from([0.0, 0.5, 1.0]))
    noise = alike * normal(1, V) + (1 - alike) * normal(R, V)
    deviation = draw(st.sampled_from([0.0, 0.3, 2.0, 4.0, 6.0, 12.0, 1000.0]))
    logits = noise * (deviation if draw(st.booleans()) else choice(0.0, 0.5, 2.0, 5.0, 10.0))
    target = torch.randint(0, V, (R,), generator=rng)
    likely = torch.rand(R, generator=rng) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    target = torch.where(likely, logits.argmax(1), target)
    boost = choice(0.0, 3.0, 10.0, 20.0) * draw(st.booleans())
    logits = logits.scatter_add(1, target[:, None], boost) + draw(st.sampled_from([0.0, 0.0, 30.0, -1000.0]))
    upstream = UPSTREAMS[draw(st.sampled_from(sorted(UPSTREAMS)))](normal(R), lengths)
    return Draw(logits, target, upstream, lengths)


@given(drawn=draws(), eps=st.sampled_from([EPS, 2.0**-6, 0.2]), guard=st.sampled_from([0.0, GUARD, 1.0]))
@settings(max_examples=250, deadline=None, derandomize=True)
def test_theorem(drawn: Draw, eps: float, guard: float) -> None:
    """In float64, where nothing but the filter is to be seen. The guard changes what is kept, not what is promised."""
    got = probe(*drawn, torch.float64, filter_eps=eps, tail_guard=guard)
    assert_within_theorem(got, drawn.target, drawn.upstream, eps, torch.float64)


@given(drawn=draws(), eps=st.sampled_from([EPS, 2.0**-6]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_theorem_in_fp32(drawn: Draw, eps: float) -> None:
    logits = drawn.logits.float().double()
    got = probe(logits, *drawn[1:], torch.float32, filter_eps=eps)
    assert_within_theorem(got, drawn.target, drawn.upstream, eps, torch.float32)


@coarse_only
@given(drawn=draws(), eps=st.sampled_from([EPS, 2.0**-6]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_theorem_under_a_coarse_screen(drawn: Draw, eps: float) -> None:
    got = probe(*drawn, torch.bfloat16, filter_eps=eps)
    assert_within_theorem(got, drawn.target, drawn.upstream, eps, torch.bfloat16)


def test_control_the_theorem_is_sharp() -> None:
    """Negative control: columns are dropped, and with a sixteenth of eps for the bound the first sees it."""
    drawn = peaked(12, 3000)
    got = probe(*drawn, torch.float64, filter_eps=2.0**-8, tail_guard=1.0)
    assert 0.5 < (~got.keep).double().mean() < 1
    assert_within_theorem(got, drawn.target, drawn.upstream, 2.0**-8, torch.float64)
    for eps in (2.0**-12, 2.0**-16):
        with pytest.raises(AssertionError, match=r"\A1\b"):
            assert_within_theorem(got, drawn.target, drawn.upstream, eps, torch.float64)
    assert got.dropped.norm() > math.sqrt(2 * 2.0**-8) / 20 * got.dz.norm()


@coarse_only
def test_coarse_factor_at_its_worst() -> None:
    """Largest logit and tail rounded up, the one column rounded down: 1.34 times the first bound, with 1.5 stated."""
    levels = torch.tensor([62.13, 62.25 - 12.5 + 0.12, 62.25 - 13 - 0.12], dtype=torch.float64)
    logits = levels.repeat_interleave(torch.tensor([1, 1, 6400]))
    high = logits.bfloat16()
    weight = torch.stack((high, (logits - high.double()).bfloat16()), 1)
    problem = one_sequence(torch.ones(1, 2, dtype=torch.bfloat16), weight, torch.tensor([0]))
    with judgements() as seen:
        evaluate(filter_of, problem)
    p = naive_logits(problem.hidden.double(), problem.to(torch.float64)).softmax(1)[0]
    dropped = p.masked_fill(seen[0].keep[0], 0.0)
    assert 1.3 * EPS * (1 - p[0]) < dropped.max() <= COARSE_FACTOR * EPS * (1 - p[0])
