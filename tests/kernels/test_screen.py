"""The screen, the judge and the tail of the filtered gradients, one function at a time."""

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_dpo import LMHead
from fused_dpo.operands import Operands
from fused_dpo.precision import has_bf16_units
from fused_dpo.screen import (
    BLOCK_ROWS,
    EVERYTHING,
    ROWS_AT_ONCE,
    Judgement,
    Screener,
    block_spans,
    exponents,
    largest_of,
    rows_screened,
    screen_shape,
    screens_coarsely,
)
from fused_dpo.tail import Tail
from tests.kernels.helpers import Problem, make_problem, naive_logits, uninitialized_memory_is_nan

EPS = 2.0**-12
UNITS = has_bf16_units(torch.device("cpu"))
needs_bf16_units = pytest.mark.skipif(not UNITS, reason="the screen is coarse only on a CPU with bf16 units")
NO_BIAS = {"lora_rank": 3, "logit_scale": 1.7, "softcap": 9.0, "temperature": 0.7}
EVERY_FEATURE = {"bias": True, **NO_BIAS}


@pytest.mark.parametrize(
    ("rows", "offsets", "block_rows", "expected"),
    [
        ([], [0], 4, []),
        ([], [0, 5, 9], 4, []),
        ([3], [0, 5], 4, [(0, 1)]),
        (range(8), [0, 8], 4, [(0, 4), (4, 8)]),
        (range(9), [0, 9], 4, [(0, 4), (4, 8), (8, 9)]),
        (range(9), [0, 3, 9], 4, [(0, 3), (3, 7), (7, 9)]),
        ([1, 2, 7, 9], [0, 0, 2, 2, 8, 10, 10], 4, [(0, 1), (1, 3), (3, 4)]),
        ([0, 4, 5, 9], [0, 5, 10], 1, [(0, 1), (1, 2), (2, 3), (3, 4)]),
    ],
)
def test_block_spans(rows: Iterable[int], offsets: list[int], block_rows: int, expected: list[tuple[int, int]]) -> None:
    """Offsets are those of all rows, spans count scored rows; a row at an offset belongs to the later sequence."""
    got = block_spans(torch.tensor(list(rows), dtype=torch.int64), torch.tensor(offsets), block_rows)
    assert got == expected


@pytest.mark.parametrize("block_rows", [1, 3, 128])
def test_blocks_cover_the_scored_rows_and_straddle_nothing(block_rows: int) -> None:
    for _ in range(30):
        lengths = torch.randint(0, 300, (6,))
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        rows = (torch.rand(int(offsets[-1])) < 0.6).nonzero().squeeze(1)
        spans = block_spans(rows, offsets, block_rows)
        assert [row for span in spans for row in range(*span)] == list(range(rows.numel()))
        assert all(0 < stop - start <= block_rows for start, stop in spans)
        sequence = torch.bucketize(rows, offsets[1:], right=True)
        assert all(sequence[start] == sequence[stop - 1] for start, stop in spans)
        assert len(spans) <= rows.numel() // block_rows + 6


def test_exponents() -> None:
    """Exponent e is the binade [2^(e-127), 2^(e-126)), with 0 and subnormals in the lowest."""
    below = math.nextafter(2.0**-12, 0)
    values = torch.tensor([1.0, 0.75, 0.5, 2.0**-12, 0.0, 1e-40, 2.0**-126])
    assert exponents(values).tolist() == [127, 126, 126, 115, 0, 0, 1]
    assert exponents(values.double()).tolist() == exponents(values).tolist()
    assert exponents(torch.tensor([2.0**-12 * (1 - 2.0**-24)])).tolist() == [114]
    assert exponents(torch.tensor([below], dtype=torch.float64)).tolist() == [115]  # rounded up to fp32: kept, not lost
    assert exponents(torch.tensor([torch.nan, torch.inf])).tolist() == [EVERYTHING] * 2
    bf16 = torch.rand(1000).bfloat16()
    assert torch.equal(exponents(bf16), exponents(bf16.float()))
    assert torch.equal(exponents(bf16).long(), torch.frexp(bf16.float()).exponent + 126)


def judge(levels: Tensor, block_of_row: Tensor, *rest: Any) -> Tensor:
    return Judgement(block_of_row, len(levels), *rest).columns(levels)


def judged(
    largest: Tensor,
    block_of_row: list[int],
    upstream: list[float],
    surprise: list[float],
    target: list[int] | None = None,
    eps: float = EPS,
) -> Tensor:
    """`judge` of blocks whose columns' largest probabilities are given; targets out of the way by default."""
    target = [largest.shape[1]] * len(upstream) if target is None else target
    rows = torch.tensor(block_of_row), torch.tensor(upstream), torch.tensor(surprise), torch.tensor(target)
    levels = torch.stack([exponents(row) for row in largest])
    return judge(levels, *rows, eps)


def columns(*values: float, V: int = 64) -> Tensor:
    """One block: the given largest probabilities first, 0 elsewhere."""
    return torch.tensor([[*values, *[0.0] * (V - len(values))]])


def test_threshold_is_eps_of_what_is_left_over() -> None:
    """By the upper end of a column's binade [2^k, 2^(k+1)): dropped where that is at most eps times the surprise."""
    values = [2.0**-11, 2.0**-12, 2.0**-12 * 0.999, 2.0**-13, 2.0**-13 * 0.999, 2.0**-14]
    for surprise, expected in (
        (1.0, [True, True, False, False, False, False]),
        (0.99, [True, True, True, True, False, False]),
        (0.5, [True, True, True, True, False, False]),
        (0.49, [True, True, True, True, True, True]),
        (0.25, [True, True, True, True, True, True]),
    ):
        kept = judged(columns(*values), [0], [1.0], [surprise])[0, : len(values)]
        assert kept.tolist() == expected, surprise


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
    surprise = [0.7, 0.25]
    values = columns(2.0**-13 * 1.42, 2.0**-13 * 0.99, 2.0**-14)
    # A row with no gradient counts in s but not in S, which is 0.495 here; G is 1 whatever the sign.
    for upstream in ([1.0, 1.0], [-1.0, 0.0], [-1.0, 1.0]):
        kept = judged(values, [0, 0], upstream, surprise)[0, :3]
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
    """However small its probability, where `|upstream| surprise > eps S`."""
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
    levels = torch.full((2, 64), EVERYTHING, dtype=torch.uint8)
    rows = torch.tensor([0, 1]), torch.tensor([1.0, 0.4]), torch.ones(2), torch.tensor([3, 3])
    assert judge(levels, *rows, 0.49).all()  # thresholds of 0.37 and 0.93


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
    """No surprise at all, but an upstream: the threshold is 0, and no probability is known to be below it."""
    assert judged(columns(1.0), [0], [1.0], [0.0]).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("of", ["upstream", "surprise"])
def test_nothing_is_dropped_where_numbers_are_not_finite(of: str, bad: float) -> None:
    """In no block: the scale S is that of all."""
    good, broken = [1.0, 1.0, 1.0], [1.0, bad, 1.0]
    rows = (broken, good) if of == "upstream" else (good, broken)
    assert judged(torch.cat([columns(0.9)] * 2), [0, 0, 1], *rows).all()


def test_no_rows() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    kept = judge(torch.empty(0, 64, dtype=torch.uint8), empty, torch.empty(0), torch.empty(0), empty, EPS)
    assert kept.shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_largest_of(dtype: torch.dtype) -> None:
    p = torch.rand(70, 1000).to(dtype)
    p[:, 3] = 0.0
    assert torch.equal(largest_of(p), p.amax(0))


@pytest.mark.parametrize("payload", [0x7FC0, 0xFFC0, 0xFFFF], ids=hex)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_largest_of_columns_beside_nan(dtype: torch.dtype, payload: int) -> None:
    """NaN of either sign (x86 makes a negative one out of inf - inf) is the guard's, and only in its own column."""
    p = torch.rand(4, 10).to(dtype)
    bits = torch.tensor(payload - (payload >> 15 << 16), dtype=torch.int16).view(torch.bfloat16)
    others = torch.arange(10) != 5
    expected = p[:, others].amax(0)
    p[2, 5] = bits.to(dtype)
    assert torch.equal(largest_of(p)[others], expected)


def test_rows_screened() -> None:
    """Multiples of 32 that fit logits and probabilities into half of the workspace, from 32 to 256."""
    hidden = torch.zeros(1, 8)
    assert rows_screened(hidden, LMHead(torch.zeros(100, 8)), 128) == ROWS_AT_ONCE
    for V, mib in ((49152, 128), (49152, 64), (20000, 32), (5003, 4)):
        rows = rows_screened(hidden, LMHead(torch.zeros(V, 8)), mib)
        assert rows % 32 == 0
        assert 32 <= rows < ROWS_AT_ONCE
        assert rows * V * 2 * 4 <= mib * 2**19 < (rows + 32) * V * 2 * 4
    assert rows_screened(hidden, LMHead(torch.zeros(49152, 8)), 1) == 32
    assert rows_screened(hidden.double(), LMHead(torch.zeros(20000, 8)), 64) == 96


@needs_bf16_units
def test_coarse_screens_hold_twice_the_rows() -> None:
    hidden, head = torch.zeros(1, 8, dtype=torch.bfloat16), LMHead(torch.zeros(49152, 8, dtype=torch.bfloat16))
    assert screens_coarsely(hidden, head)
    assert rows_screened(hidden, head, 64) == 160
    assert not screens_coarsely(hidden, replace(head, bias=torch.zeros(49152)))
    assert not screens_coarsely(hidden.half(), head)
    assert not screens_coarsely(hidden.float(), head)
    assert rows_screened(hidden.float(), head, 64) == 64  # 85 would fit


@pytest.mark.parametrize(("V", "mib", "block_rows"), [(1000, 128, 128), (49152, 16, 32), (20000, 16, 32)])
def test_screen_shape(V: int, mib: int, block_rows: int) -> None:
    """Enough for any placement of the scored rows, and by shapes alone."""
    hidden, head = torch.zeros(1, 8), LMHead(torch.zeros(V, 8))
    assert min(rows_screened(hidden, head, mib), BLOCK_ROWS) == block_rows
    for lengths in ([1] * 7, [128, 1], [129, 0, 300], [block_rows + 1] * 3, [0, 0]):
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        spans = block_spans(torch.arange(sum(lengths)), offsets, block_rows)
        bound, kinds, width = screen_shape(hidden, head, sum(lengths), len(lengths), mib)
        assert (kinds, width) == (2, V)  # largest and mean
        assert len(spans) <= bound <= sum(lengths) // block_rows + 1 + len(lengths)


def screener(problem: Problem, workspace_mib: int = 128) -> Screener:
    return Screener(Operands(problem.hidden, torch.arange(problem.hidden.shape[0]), problem.head), workspace_mib)


@pytest.mark.parametrize("mib", [1, 128], ids="{} MiB".format)
@pytest.mark.parametrize("features", [{}, NO_BIAS, EVERY_FEATURE], ids=["plain", "no bias", "everything"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("V", "D"), [(3001, 64), (100, 33)])
def test_look(V: int, D: int, dtype: torch.dtype, features: dict, mib: int) -> None:
    """Logits and probabilities of any rows, against float64."""
    problem = make_problem((100,), V, D, **features).to(dtype)
    exact = problem.to(torch.float64)
    with uninitialized_memory_is_nan():
        screen = screener(problem, mib)
        for start, stop in ((0, 1), (0, 32), (3, 35), (36, 68), (93, 100)):
            z, p = screen.look(start, stop)
            truth = naive_logits(exact.hidden[start:stop], exact)
            assert z.shape == p.shape == (stop - start, V)
            scale = float(truth.abs().max())
            # Accumulated in fp32: some twenty roundings. Coarse: five roundings to bf16 (unit 2^-8), as the features
            # are in bf16 too; the adapter's inner product is rounded to the dtype in any half precision.
            unit = 2e-15 if dtype == torch.float64 else 2e-6
            if screen.coarse:
                unit = 2.0**-8 * (1 if not features else 3)
            elif features and dtype.itemsize == 2:
                unit = torch.finfo(dtype).eps * 3
            assert (z.double() - truth).abs().max() <= unit * scale
            assert (p.double().sum(1) - 1).abs().max() <= (2.0**-6 if screen.coarse else 1e-5)
            ratio = (p.double() / truth.softmax(1)).log().abs()
            assert ratio[truth.softmax(1) > 1e-30].max() <= 2 * unit * scale + (2.0**-8 if screen.coarse else 2e-5)
    assert screen.coarse == (UNITS and dtype == torch.bfloat16 and "bias" not in features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_row_do_not_depend_on_the_group(dtype: torch.dtype) -> None:
    """Alone, in the middle of 200 rows, or at another place."""
    problem = make_problem((ROWS_AT_ONCE,), 3001, 64).to(dtype)
    screen = screener(problem)
    together = [part.clone() for part in screen.look(0, ROWS_AT_ONCE)]
    for start, stop in ((7, 8), (0, 64), (100, 131), (50, 250), (1, ROWS_AT_ONCE)):
        for part, whole in zip(screen.look(start, stop), together, strict=True):
            assert torch.equal(part, whole[start:stop])


def test_groups() -> None:
    """Consecutive blocks, as many as fit, each once."""
    problem = make_problem((1,), 20000, 8).to(torch.float32)
    screen = screener(problem, 64)
    assert screen.rows == 192
    assert list(screen.groups([])) == []
    assert list(screen.groups([(0, 128), (128, 192)])) == [[(0, 128), (128, 192)]]
    assert list(screen.groups([(0, 128), (128, 193)])) == [[(0, 128)], [(128, 193)]]
    spans = block_spans(torch.arange(3000), torch.tensor([0, 5, 700, 701, 702, 1500, 3000]), 128)
    groups = list(screen.groups(spans))
    assert [span for group in groups for span in group] == spans
    assert all(group[-1][1] - group[0][0] <= screen.rows for group in groups)
    neighbours = pairwise(groups)
    assert all(after[0][1] - group[0][0] > screen.rows for group, after in neighbours)  # as many as fit


def tail_of(
    means: Tensor, keep: Tensor, offset: Tensor | None = None, dtype: torch.dtype = torch.float64, **settings: Any
) -> tuple[Tail, Tensor]:
    """The tail of blocks with these mean probabilities [blocks, V], and the factor it is multiplied with [V, K]."""
    blocks, V = means.shape
    problem = make_problem((4,), V, 33, **settings).to(dtype)
    operands = Operands(problem.hidden, torch.arange(4), problem.head)
    levels = torch.stack([exponents(row) for row in means])
    offset = torch.zeros(blocks, dtype=operands.acc_dtype) if offset is None else offset.to(operands.acc_dtype)
    weight = operands.read_weight(slice(0, V), operands.buffer(V)).double()
    return Tail(operands, levels, keep, offset), weight


def some_means(blocks: int = 37, V: int = 301) -> Tensor:
    """Those of rows from flat to sure, over more blocks than are summed at a time."""
    spread = torch.linspace(0, 8, blocks, dtype=torch.float64)[:, None]
    return (spread * torch.randn(blocks, V, dtype=torch.float64)).softmax(1)


def expected_tail(means: Tensor, keep: Tensor) -> Tensor:
    """In float64: powers of two below the means, over what they sum to with the kept ones, 0 for those."""
    powers = means.log2().floor().exp2()
    return (powers / powers.sum(1, keepdim=True)).masked_fill(keep, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tail_columns(dtype: torch.dtype) -> None:
    """Both results, any slice of columns; a mean is known to a factor of two."""
    means = some_means()
    keep = torch.rand(means.shape) < 0.3
    tail, _ = tail_of(means, keep, dtype=dtype)
    expected = expected_tail(means, keep)
    for first, stop in ((0, 301), (0, 1), (17, 130), (300, 301)):
        p, dz = tail.columns(first, stop)
        assert p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(p.double(), expected[:, first:stop], rtol=1e-6, atol=0)
        assert torch.equal(p, dz)
    dropped = ~keep
    ratio = expected[dropped] / means[dropped]
    assert 0.5 < ratio.min() < 1 < ratio.max() < 2  # the sum of the powers is between a half and 1


def test_tail_columns_through_the_logits() -> None:
    """Scale, softcap and temperature: derivatives where the block's mean log-sum-exp puts a mean's logit."""
    means, keep = some_means(3, 50), torch.zeros(3, 50, dtype=torch.bool)
    offset = torch.tensor([-2.0, 3.0, 5.0])
    tail, _ = tail_of(means, keep, offset, logit_scale=1.7, softcap=30.0, temperature=0.7)
    p, dz = tail.columns(0, 50)
    z = (p.log() + offset[:, None]) * 0.7 / 30.0
    torch.testing.assert_close(dz, p * (1 - z**2) * 1.7 / 0.7, rtol=1e-12, atol=0)
    assert not torch.allclose(dz, p * 1.7 / 0.7, rtol=0.01)


@pytest.mark.parametrize("width", [1, 128, 1000])
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 3}, {"logit_scale": 2.0}], ids=["plain", "adapter", "scale"])
def test_tail_spread(settings: dict, width: int) -> None:
    """The dropped means' share of each weight row, over their sum; the bias has no part in it."""
    means = some_means(5, 301)
    keep = torch.rand(means.shape) < 0.3
    keep[1], keep[2] = False, True
    with uninitialized_memory_is_nan():
        tail, weight = tail_of(means, keep, **settings)
        spread = tail.spread(width)
    expected = expected_tail(means, keep)
    expected = expected / expected.sum(1, keepdim=True).clamp(min=1e-300) * settings.get("logit_scale", 1.0)
    torch.testing.assert_close(spread, expected @ weight, rtol=1e-6, atol=1e-9)
    assert (spread[2] == 0).all()  # nothing dropped there


def test_tail_of_what_is_not_a_number() -> None:
    """Exponents of NaN and infinity, of zero and of subnormals count for nothing."""
    means = torch.tensor([[0.5, torch.nan, torch.inf, 0.0, 1e-40, 0.25]])
    tail, weight = tail_of(means, torch.zeros(1, 6, dtype=torch.bool))
    assert tail.columns(0, 6)[0][0].tolist() == pytest.approx([2 / 3, 0, 0, 0, 0, 1 / 3], rel=1e-6)
    torch.testing.assert_close(tail.spread(4)[0], (2 * weight[0] + weight[5]) / 3, rtol=1e-6, atol=1e-9)
    empty, _ = tail_of(torch.zeros(2, 6), torch.zeros(2, 6, dtype=torch.bool))
    assert (empty.columns(0, 6)[0] == 0).all()
    assert (empty.spread(6) == 0).all()


def test_tail_of_no_blocks() -> None:
    levels, keep = torch.zeros(0, 6, dtype=torch.uint8), torch.zeros(0, 6, dtype=torch.bool)
    problem = make_problem((4,), 6, 33)
    operands = Operands(problem.hidden, torch.arange(4), problem.head)
    tail = Tail(operands, levels, keep, torch.zeros(0, dtype=torch.float64))
    assert tail.columns(2, 5)[0].shape == (0, 3)
    assert tail.spread(6).shape == (0, operands.width)
