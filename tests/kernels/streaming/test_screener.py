"""The screen of the filtered gradients: its blocks, what it looks at, and what it notes."""

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fused_dpo import LMHead
from fused_dpo.filtering import EVERYTHING
from fused_dpo.linalg.operands import Operands
from fused_dpo.streaming.online_softmax import OnlineSoftmax
from fused_dpo.streaming.screener import (
    BLOCK_ROWS,
    SCREENED_ROWS,
    Screener,
    block_spans,
    exponents,
    largest_of,
    rows_screened,
    screen_shape,
    screens_coarsely,
)
from tests.kernels.support.filtered import UNITS, coarse_only
from tests.kernels.support.problems import (
    EVERY_FEATURE,
    Problem,
    make_problem,
    naive_logits,
    uninitialized_memory_is_nan,
)

pytestmark = pytest.mark.cpu_units

NO_BIAS = {name: value for name, value in EVERY_FEATURE.items() if name != "bias"}


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
    """Multiples of 32 whose logits fit into three quarters of the workspace, from 32 to 512."""
    hidden = torch.zeros(1, 8)
    assert rows_screened(hidden, LMHead(torch.zeros(100, 8)), 128) == SCREENED_ROWS
    for V, mib in ((49152, 96), (49152, 64), (20000, 32), (5003, 4)):
        rows = rows_screened(hidden, LMHead(torch.zeros(V, 8)), mib)
        assert rows % 32 == 0
        assert 32 <= rows < SCREENED_ROWS
        assert rows * V * 4 <= mib * 3 * 2**18 < (rows + 32) * V * 4
    assert rows_screened(hidden, LMHead(torch.zeros(49152, 8)), 1) == 32
    assert rows_screened(hidden.double(), LMHead(torch.zeros(20000, 8)), 64) == 288


@coarse_only
def test_coarse_screens_hold_probabilities_besides() -> None:
    hidden, head = torch.zeros(1, 8, dtype=torch.bfloat16), LMHead(torch.zeros(49152, 8, dtype=torch.bfloat16))
    assert screens_coarsely(hidden, head)
    assert rows_screened(hidden, head, 64) == 160
    for more in ({"bias": torch.zeros(49152)}, {"logit_scale": 0.5}, {"temperature": 0.7}, {"softcap": 30.0}):
        assert not screens_coarsely(hidden, replace(head, **more)), more
    assert not screens_coarsely(hidden.half(), head)
    assert not screens_coarsely(hidden.float(), head)
    assert rows_screened(hidden.float(), head, 64) == 256


@pytest.mark.parametrize(("V", "mib", "block_rows"), [(1000, 128, 128), (49152, 8, 32), (20000, 8, 64)])
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


def looked_at(screen: Screener, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Copies of logits and probabilities of the rows `start:stop`, as the forward comes by them."""
    if screen.coarse:
        return screen.look(start, stop)
    tiles, dtype = len(screen.bounds), screen.operands.acc_dtype
    online = OnlineSoftmax(tiles, stop - start, dtype, torch.device("cpu"), want_stats=False)
    nowhere = torch.zeros(stop - start, 1, dtype=torch.int64), torch.zeros(stop - start, 1, dtype=torch.bool)
    logits, peaks = [], []
    for columns, z in screen.tiles(start, stop):
        assert columns.start == sum(part.shape[1] for part in logits)
        logits.append(z.clone())
        peaks.append(online.fold(len(peaks), z, *nowhere, slice(None)))
    softmax = online.merge(tiles, slice(None))
    return torch.cat(logits, 1), screen.probabilities(peaks, softmax.peak, softmax.total)


@pytest.mark.parametrize("mib", [1, 128], ids="{} MiB".format)
@pytest.mark.parametrize(
    "features", [{}, {"lora_rank": 3}, NO_BIAS, EVERY_FEATURE], ids=["plain", "adapter", "no bias", "everything"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("V", "D"), [(3001, 64), (100, 33)])
def test_look(V: int, D: int, dtype: torch.dtype, features: dict, mib: int) -> None:
    """Logits and probabilities of any rows, against float64."""
    problem = make_problem((100,), V, D, **features).to(dtype)
    exact = problem.to(torch.float64)
    with uninitialized_memory_is_nan():
        screen = screener(problem, mib)
        for start, stop in ((0, 1), (0, 32), (3, 35), (36, 68), (93, 100)):
            z, p = looked_at(screen, start, stop)
            truth = naive_logits(exact.hidden[start:stop], exact)
            assert z.shape == p.shape == (stop - start, V)
            scale = float(truth.abs().max())
            # Accumulated in fp32: some twenty roundings. Coarse: five roundings to bf16 (unit 2^-8), as the features
            # are in bf16 too; the adapter's inner product is rounded to the dtype in any half precision.
            unit = 2e-15 if dtype == torch.float64 else 2e-6
            if screen.coarse:
                unit = 2.0**-8 * (2 if features else 1)
            elif features and dtype.itemsize == 2:
                unit = torch.finfo(dtype).eps * 3
            assert (z.double() - truth).abs().max() <= unit * scale
            # Softmax in fp32 sums and divides 3001 terms; a coarse one rounds each to bf16 besides, unit 2^-8.
            assert (p.double().sum(1) - 1).abs().max() <= (2.0**-6 if screen.coarse else 1e-5)
            ratio = (p.double() / truth.softmax(1)).log().abs()
            least = 2e-26 if screen.operands.acc_dtype == torch.float32 and not screen.coarse else 1e-30
            assert ratio[truth.softmax(1) > least].max() <= 2 * unit * scale + (2.0**-8 if screen.coarse else 2e-5)
    assert screen.coarse == (UNITS and dtype == torch.bfloat16 and set(features) <= {"lora_rank"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_row_do_not_depend_on_the_group(dtype: torch.dtype) -> None:
    """Alone, in the middle of 200 rows, or at another place."""
    problem = make_problem((SCREENED_ROWS,), 3001, 64).to(dtype)
    screen = screener(problem)
    most = screen.rows
    together = [part.clone() for part in looked_at(screen, 0, most)]
    for start, stop in ((7, 8), (0, 64), (100, 131), (50, 250), (1, most)):
        for part, whole in zip(looked_at(screen, start, stop), together, strict=True):
            assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize(
    ("dtype", "gap", "rounding", "faint"),  # the differences of logits are rounded, up to 180
    [(torch.float32, 40.0, 1e-5, 2e-26), (torch.float32, 100.0, 1e-5, 2e-26), (torch.float64, 200.0, 1e-13, 1e-250)],
)
def test_probabilities_far_below_the_rest(dtype: torch.dtype, gap: float, rounding: float, faint: float) -> None:
    """What is impossible has 0, and so has all of a tile that would be subnormal throughout."""
    hidden, weight = torch.ones(1, 64, dtype=dtype), torch.zeros(5000, 64, dtype=dtype)
    weight[:, 0] = -80.0 * torch.linspace(0, 1, 5000, dtype=dtype).mul(50).remainder(1)
    weight[4500:, 0] += gap
    weight[[100, 4600], 0] = -torch.inf
    screen = Screener(Operands(hidden, torch.arange(1), LMHead(weight)), 128)
    with uninitialized_memory_is_nan():
        z, p = looked_at(screen, 0, 1)
    assert z[0, :4500].max() <= z[0].max() - gap + 1
    assert (p[0, [100, 4600]] == 0).all()
    assert gap != 100.0 or not p[0, :1000].any()
    torch.testing.assert_close(p.double(), z.double().softmax(1), rtol=rounding, atol=faint)


def test_groups() -> None:
    """Consecutive blocks, as many as fit, each once."""
    problem = make_problem((1,), 20000, 8).to(torch.float32)
    screen = screener(problem, 21)
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
