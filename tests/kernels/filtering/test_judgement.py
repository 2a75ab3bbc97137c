"""What the backward of the filtered gradients keeps: thresholds by upstream gradient and one_minus_p, and targets."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_dpo.filtering import EVERYTHING, Judgement
from fused_dpo.streaming.screener import exponents
from tests.kernels.support.filtered import EPS


def judge(screen: Tensor, block_of_row: Tensor, *rest: Any) -> Tensor:
    return Judgement(block_of_row, len(screen), *rest).columns(screen)[0]


def judged(
    largest: Tensor,
    block_of_row: list[int],
    upstream: list[float],
    one_minus_p: list[float],
    target: list[int] | None = None,
    eps: float = EPS,
) -> Tensor:
    """`judge` of blocks whose columns' largest probabilities are given; targets out of the way by default."""
    target = [largest.shape[1]] * len(upstream) if target is None else target
    rows = torch.tensor(block_of_row), torch.tensor(upstream), torch.tensor(one_minus_p), torch.tensor(target)
    screen = torch.stack([exponents(row) for row in largest])
    return judge(screen, *rows, eps)


def columns(*values: float, V: int = 64) -> Tensor:
    """One block: the given largest probabilities first, 0 elsewhere."""
    return torch.tensor([[*values, *[0.0] * (V - len(values))]])


def test_threshold_is_eps_of_what_is_left_over() -> None:
    """By the upper end of a column's binade [2^k, 2^(k+1)): dropped where that is at most eps times the one_minus_p."""
    values = [2.0**-11, 2.0**-12, 2.0**-12 * 0.999, 2.0**-13, 2.0**-13 * 0.999, 2.0**-14]
    for one_minus_p, expected in (
        (1.0, [True, True, False, False, False, False]),
        (0.99, [True, True, True, True, False, False]),
        (0.5, [True, True, True, True, False, False]),
        (0.49, [True, True, True, True, True, True]),
        (0.25, [True, True, True, True, True, True]),
    ):
        kept = judged(columns(*values), [0], [1.0], [one_minus_p])[0, : len(values)]
        assert kept.tolist() == expected, one_minus_p


@pytest.mark.parametrize("exponent", [-1, -4, -12, -30, -60])
def test_no_dropped_column_is_above_the_threshold(exponent: int) -> None:
    """Around every power of two, with thresholds just below, at and above it."""
    around = 2.0**exponent * torch.tensor([0.25, 0.499, 0.5, 0.51, 0.999, 1.0, 1.001, 1.999, 2.0, 4.0])
    probabilities = columns(*around.clamp(max=1.0).tolist())
    for factor in (0.51, 0.999, 1.0, 1.001, 1.9):
        threshold = min(2.0**exponent * factor, 0.49)
        kept = judged(probabilities, [0], [1.0], [1.0], eps=threshold)[0]
        dropped = probabilities[0][~kept]
        assert dropped.max() <= threshold * (1 + 1e-5)  # the logarithm is taken in fp32, and is about 100
        assert (probabilities[0][kept] > threshold / 4).all()  # and nothing is kept that is far below


def test_threshold_of_a_block_is_by_its_largest_upstream_and_mean_square_surprise() -> None:
    """Root mean square 0.526, where the mean is 0.475 and the mean square 0.276: what is below 2^-13 is dropped."""
    one_minus_p = [0.7, 0.25]
    values = columns(2.0**-13 * 1.42, 2.0**-13 * 0.99, 2.0**-14)
    # A row with no gradient counts in s but not in S, which is 0.495 here; G is 1 whatever the sign.
    for upstream in ([1.0, 1.0], [-1.0, 0.0], [-1.0, 1.0]):
        kept = judged(values, [0, 0], upstream, one_minus_p)[0, :3]
        assert kept.tolist() == [True, False, False], upstream


def test_small_upstream_raises_the_threshold() -> None:
    """Two blocks of one row: S is that of both, so the block with a thousandth of the gradient drops more."""
    values = torch.cat([columns(0.3, 0.05, 2.0**-8, 2.0**-10)] * 2)
    scale = math.sqrt((1 + 1e-6) / 2)
    kept = judged(values, [0, 1], [1.0, 1e-3], [1.0, 1.0])
    assert kept[0, :4].all()
    threshold = EPS * scale / 1e-3  # 0.17
    assert kept[1, :4].tolist() == [True, False, False, False]
    assert values[1][~kept[1]].max() <= threshold


def test_negligible_block_drops_everything() -> None:
    """`|upstream| <= eps S` throughout: not even what has probability 1 is kept, nor the target."""
    values = torch.cat([columns(1.0, 0.5)] * 2)
    kept = judged(values, [0, 1], [1.0, EPS / 2], [1.0, 1.0], [5, 5])
    assert kept[0, [0, 1, 5]].all()
    assert not kept[1].any()
    kept = judged(values, [0, 1], [1.0, EPS * 2], [1.0, 1.0], [5, 5])
    assert kept[1, [0, 5]].all()


def test_target_is_kept_unless_negligible() -> None:
    """However small its probability, where `|upstream| one_minus_p > eps S`."""
    values = columns(2.0**-3)
    assert judged(values, [0], [1.0], [1.0], [40])[0].nonzero().squeeze(1).tolist() == [0, 40]
    kept = judged(values, [0, 0], [1.0, 1e-5], [1.0, 1.0], [40, 41])  # one block: 1e-5 < eps S
    assert kept[0, [40, 41]].tolist() == [True, False]
    kept = judged(values, [0, 0], [1.0, 1.0], [1.0, 1e-5], [40, 41])
    assert kept[0, [40, 41]].tolist() == [True, False]
    kept = judged(values, [0, 0], [1.0, -1e-3], [1.0, 1.0], [40, 41])
    assert kept[0, [40, 41]].all()


def test_targets_of_other_blocks_are_not_kept() -> None:
    kept = judged(torch.cat([columns(0.3)] * 2), [0, 0, 1], [1.0] * 3, [1.0] * 3, [7, 8, 9])
    assert kept[:, [7, 8, 9]].tolist() == [[True, True, False], [False, False, True]]


def test_no_target_is_no_index() -> None:
    """V stands for an invalid label, and is no column."""
    assert judged(columns(0.3), [0], [1.0], [1.0], [64])[0].sum() == 1


def test_more_than_half_is_all() -> None:
    half = columns(*[0.01] * 32)
    assert judged(half, [0], [1.0], [1.0])[0].sum() == 32
    more = columns(*[0.01] * 33)
    assert judged(more, [0], [1.0], [1.0]).all()
    assert judged(half, [0], [1.0], [1.0], [50]).all()  # the target counts


def test_everything_stays_everything() -> None:
    """Of a block that is to be computed exactly no column is dropped, by the largest of thresholds."""
    screen = torch.full((2, 64), EVERYTHING, dtype=torch.uint8)
    rows = torch.tensor([0, 1]), torch.tensor([1.0, 0.4]), torch.ones(2), torch.tensor([3, 3])
    assert judge(screen, *rows, 0.49).all()  # thresholds of 0.37 and 0.93


@pytest.mark.parametrize("upstream", [1e-30, 1e-20, 1e20, 1e30])
def test_only_ratios_of_upstream_matter(upstream: float) -> None:
    """Their squares may underflow or overflow: then less is dropped, never more."""
    values = torch.cat([columns(0.3, 0.05, 2.0**-8, 2.0**-13 * 0.9)] * 2)
    expected = judged(values, [0, 1], [1.0, 1e-2], [1.0, 1.0], [9, 9])
    got = judged(values, [0, 1], [upstream, 1e-2 * upstream], [1.0, 1.0], [9, 9])
    assert (got >= expected).all()
    assert expected[1].sum() < expected[0].sum() < 64


def test_no_upstream_keeps_nothing() -> None:
    kept = judged(torch.cat([columns(0.9)] * 2), [0, 0, 1], [0.0, -0.0, 0.0], [1.0, 0.5, 0.0], [1, 2, 3])
    assert not kept.any()


def test_no_upstream_in_one_block() -> None:
    kept = judged(torch.cat([columns(0.9)] * 2), [0, 1], [1.0, 0.0], [1.0, 1.0], [1, 2])
    assert kept.sum(1).tolist() == [2, 0]


def test_certain_rows_keep_everything() -> None:
    """No one_minus_p at all, but an upstream: the threshold is 0, and no probability is known to be below it."""
    assert judged(columns(1.0), [0], [1.0], [0.0]).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("of", ["upstream", "one_minus_p"])
def test_nothing_is_dropped_where_numbers_are_not_finite(of: str, bad: float) -> None:
    """In no block: the scale S is that of all."""
    good, broken = [1.0, 1.0, 1.0], [1.0, bad, 1.0]
    rows = (broken, good) if of == "upstream" else (good, broken)
    assert judged(torch.cat([columns(0.9)] * 2), [0, 0, 1], *rows).all()


def test_no_rows() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    kept = judge(torch.empty(0, 64, dtype=torch.uint8), empty, torch.empty(0), torch.empty(0), empty, EPS)
    assert kept.shape == (0, 64)


def test_rows_without_a_target_mark_nothing() -> None:
    """As where `row_index` names an ignored row, which only a CPU refuses: -1 is no column, of its block or another."""
    nothing = torch.zeros(2, 64)
    assert not judged(nothing, [0, 1], [1.0, 1.0], [1.0, 1.0], target=[-1, -1]).any()
    assert judged(nothing, [0, 1], [1.0, 1.0], [1.0, 1.0], target=[-1, 63]).nonzero().tolist() == [[1, 63]]
