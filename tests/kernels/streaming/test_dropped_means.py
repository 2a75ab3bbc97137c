"""The tail of the filtered gradients: what the dropped columns are taken to be."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_dpo.linalg.operands import Operands
from fused_dpo.streaming.dropped_means import DroppedMeans
from fused_dpo.streaming.screener import exponents
from tests.kernels.support.probe import screened
from tests.kernels.support.problems import make_problem, uninitialized_memory_is_nan


def tail_of(
    means: Tensor, keep: Tensor, offset: Tensor | None = None, dtype: torch.dtype = torch.float64, **settings: Any
) -> tuple[DroppedMeans, Tensor]:
    """The tail of blocks with these mean probabilities [blocks, V], and the factor it is multiplied with [V, K]."""
    blocks, V = means.shape
    problem = make_problem((4,), V, 33, **settings).to(dtype)
    operands = Operands(problem.hidden, torch.arange(4), problem.head)
    screen = torch.stack([exponents(row) for row in means])
    offset = torch.zeros(blocks, dtype=operands.acc_dtype) if offset is None else offset.to(operands.acc_dtype)
    weight = operands.read_weight(slice(0, V), operands.buffer(V)).double()
    return DroppedMeans(operands, screen, keep, offset), weight


def some_means(blocks: int = 37, V: int = 301) -> Tensor:
    """Those of rows from flat to sure, over more blocks than are summed at a time."""
    spread = torch.linspace(0, 8, blocks, dtype=torch.float64)[:, None]
    return (spread * torch.randn(blocks, V, dtype=torch.float64)).softmax(1)


def dropped_means(means: Tensor, keep: Tensor) -> Tensor:
    """In float64: powers of two below the means, over what they sum to with the kept ones, 0 for those."""
    return screened(means).masked_fill(keep, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tail_columns(dtype: torch.dtype) -> None:
    """Both results, any slice of columns; a mean is known to a factor of two."""
    means = some_means()
    keep = torch.rand(means.shape) < 0.3
    tail, _ = tail_of(means, keep, dtype=dtype)
    expected = dropped_means(means, keep)
    # The powers are exact; their sum and its inverse are fp32 in every dtype, a few roundings of 6e-8.
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
    torch.testing.assert_close(dz, p * (1 - z**2) * 1.7 / 0.7, rtol=1e-12, atol=0)  # float64, a dozen operations
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
        spread = tail.spread(width, tail.operands.buffer(width))
    expected = dropped_means(means, keep)
    expected = expected / expected.sum(1, keepdim=True).clamp(min=1e-300) * settings.get("logit_scale", 1.0)
    torch.testing.assert_close(spread, expected @ weight, rtol=1e-12, atol=1e-12)  # float64: the fp32 sum cancels out
    assert (spread[2] == 0).all()  # nothing dropped there


def test_tail_of_what_is_not_a_number() -> None:
    """Exponents of NaN and infinity, of zero and of subnormals count for nothing."""
    means = torch.tensor([[0.5, torch.nan, torch.inf, 0.0, 1e-40, 0.25]])
    tail, weight = tail_of(means, torch.zeros(1, 6, dtype=torch.bool))
    p, _ = tail.columns(0, 6)
    assert p[0].tolist() == pytest.approx([2 / 3, 0, 0, 0, 0, 1 / 3], rel=1e-7)  # an inverse in fp32
    torch.testing.assert_close(
        tail.spread(4, tail.operands.buffer(4))[0], (2 * weight[0] + weight[5]) / 3, rtol=1e-12, atol=1e-12
    )
    empty, _ = tail_of(torch.zeros(2, 6), torch.zeros(2, 6, dtype=torch.bool))
    assert (empty.columns(0, 6)[0] == 0).all()
    assert (empty.spread(6, empty.operands.buffer(6)) == 0).all()


def test_tail_of_no_blocks() -> None:
    screen, keep = torch.zeros(0, 6, dtype=torch.uint8), torch.zeros(0, 6, dtype=torch.bool)
    problem = make_problem((4,), 6, 33)
    operands = Operands(problem.hidden, torch.arange(4), problem.head)
    tail = DroppedMeans(operands, screen, keep, torch.zeros(0, dtype=torch.float64))
    assert tail.columns(2, 5)[0].shape == (0, 3)
    assert tail.spread(6, operands.buffer(6)).shape == (0, operands.width)
