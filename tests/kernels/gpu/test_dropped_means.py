"""The tail of the filtered gradients by its Triton kernel, against the one in torch."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fused_dpo.gpu.filtered.backward import _spread_of_blocks
from fused_dpo.gpu.filtered.dropped_means import TAIL_BLOCK, TAIL_SCALE, dropped_means
from fused_dpo.head import Needs
from fused_dpo.linalg.gradient_sums import GradientSums
from fused_dpo.linalg.operands import Operands
from fused_dpo.streaming.dropped_means import DroppedMeans
from fused_dpo.streaming.screener import exponents
from tests.kernels.support.gpu import DEVICE, TRITON_DTYPES, on_device
from tests.kernels.support.problems import make_problem

EVERYTHING = {"logit_scale": 0.7, "softcap": 30.0, "temperature": 0.8, "lora_rank": 3}


def a_tail(dtype: torch.dtype, V: int = 301, blocks: int = 5, **settings: Any) -> tuple[Operands, DroppedMeans]:
    """Of blocks from flat to sure, a third of the columns kept."""
    problem = on_device(make_problem((4,), V, 33, **settings).to(dtype))
    operands = Operands(problem.hidden, torch.arange(4, device=DEVICE), problem.head)
    sureness = torch.linspace(0, 8, blocks, dtype=torch.float64)[:, None]
    means = (sureness * torch.randn(blocks, V, dtype=torch.float64)).softmax(1)
    screen = torch.stack([torch.zeros(blocks, V, dtype=torch.uint8), torch.stack([exponents(row) for row in means])], 1)
    keep = (torch.rand(blocks, V) < 0.3).to(DEVICE)
    return operands, DroppedMeans(operands, screen.to(DEVICE)[:, 1], keep, torch.linspace(-1, 3, blocks, device=DEVICE))


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("V", [1, 301, TAIL_BLOCK + 70])
def test_dropped_means(V: int, settings: dict[str, Any], dtype: torch.dtype) -> None:
    operands, tail = a_tail(dtype, V, **settings)
    got = dropped_means(operands, tail.means, tail.keep, tail.offset)
    p, dz = tail.columns(0, V)
    factor = operands.head.logit_scale / operands.head.temperature
    # fp32: sums of up to 8000 powers of two in another order, and a softcap's square.
    torch.testing.assert_close(got.mass, p.sum(1), rtol=2e-6, atol=0)
    rtol = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    smallest = 0.0 if dtype == torch.float32 else float(torch.finfo(dtype).smallest_normal) / TAIL_SCALE
    torch.testing.assert_close(got.values.float() / TAIL_SCALE * factor, dz, rtol=rtol, atol=smallest * rtol)
    assert got.values.dtype == dtype
    assert (got.values[tail.keep] == 0).all()


def test_what_is_kept_or_not_finite_counts_for_nothing() -> None:
    operands, tail = a_tail(torch.float32, V=40, blocks=3)
    tail.keep[0], tail.keep[1:] = True, False
    tail.means[1, 7], tail.means[2] = 255, 0
    got = dropped_means(operands, tail.means, tail.keep, tail.offset)
    assert got.mass.tolist() == [0.0, pytest.approx(1.0, rel=1e-6), 0.0]
    assert (got.values[[0, 2]] == 0).all()
    assert got.values[1, 7] == 0
    assert got.values[1].count_nonzero() == 39


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("needs", ["hidden", "lora_a"])
@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["plain", "everything"])
def test_spread_of_blocks(settings: dict[str, Any], needs: str, weight_dtype: torch.dtype) -> None:
    """The mean row of the head, also where the weight has to be brought to the hidden states' dtype in slices."""
    operands, tail = a_tail(torch.float16, V=5000, **settings)
    head = replace(operands.head, weight=operands.head.weight.to(weight_dtype))
    operands = Operands(operands.hidden, operands.rows, head)
    sums = GradientSums(operands, 0, Needs(needs == "hidden", False, False, needs == "lora_a", False), empty=False)
    tail.keep[1] = True  # drops nothing
    means = dropped_means(operands, tail.means, tail.keep, tail.offset)
    got = _spread_of_blocks(sums, means, workspace_mib=1)
    expected = tail.spread(1000, operands.buffer(1000))[:, sums.hidden_columns]
    assert got.shape == expected.shape
    # Means of numbers of order 1; each weight of the mean is rounded to fp16, by 2^-12.
    torch.testing.assert_close(got, expected, rtol=0, atol=2**-11)
    assert (got[1] == 0).all()
