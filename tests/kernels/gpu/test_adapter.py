"""Low-rank adapters in the Triton kernels: the inner product, and ranks beyond what is multiplied at a time."""

import pytest
import torch
from torch import Tensor

from fused_dpo.gpu import backward as triton_backward
from fused_dpo.gpu.adapter import ADAPTER_ROWS, through_adapter
from fused_dpo.gpu.launch import rank_block
from tests.kernels.support.gpu import DEVICE, TRITON_DTYPES, on_device, order_products
from tests.kernels.support.problems import IGNORE, assert_agrees, evaluate, fused, make_problem


def problem(dtype: torch.dtype, T: int, D: int, rank: int) -> tuple[Tensor, Tensor]:
    return torch.randn(T, D).to(DEVICE, dtype), torch.randn(rank, D).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("R", [1, ADAPTER_ROWS, ADAPTER_ROWS + 1])
@pytest.mark.parametrize("rank", [1, 16, 33, 70])
@pytest.mark.parametrize("D", [1, 32, 65])
def test_inner_product(dtype: torch.dtype, R: int, rank: int, D: int) -> None:
    """Of some rows, accumulated in fp32 and rounded once."""
    hidden, a = problem(dtype, R + 3, D, rank)
    rows = torch.randperm(R + 3, device=DEVICE)[:R].sort().values
    got = through_adapter(hidden, rows, (a, a, 0.5))
    true = 0.5 * hidden[rows].double() @ a.double().T
    assert got.dtype == dtype
    assert got.is_contiguous()
    scale = hidden[rows].double().norm(dim=1)[:, None] * a.double().norm(dim=1)
    assert float(((got.double() - true).abs() / scale).max()) <= torch.finfo(dtype).eps


def test_strides() -> None:
    hidden, a = problem(torch.float32, 9, 40, 5)
    rows = torch.arange(9, device=DEVICE)
    expected = through_adapter(hidden, rows, (a, a, 1.0))
    strided = hidden.T.contiguous().T, a.T.contiguous().T
    assert torch.equal(through_adapter(strided[0], rows, (strided[1], a, 1.0)), expected)


@pytest.mark.cpu_units
def test_a_row_alone_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else there is, and wherever in the block it stands."""
    order_products(monkeypatch)
    hidden, a = problem(torch.float32, 150, 70, 20)
    every = through_adapter(hidden, torch.arange(150, device=DEVICE), (a, a, 1.0))
    for row in (0, 63, 64, 149):
        assert torch.equal(through_adapter(hidden, torch.tensor([row], device=DEVICE), (a, a, 1.0))[0], every[row])


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "library"])
def test_ranks_beyond_a_block(dtype: torch.dtype, impl: str) -> None:
    rank = 2 * rank_block(512, dtype) + 1
    whole = on_device(make_problem((5, 20), V=70, D=17, lora_rank=rank).to(dtype))
    assert_agrees(evaluate(lambda p: fused(p, impl=impl), whole), whole)


@pytest.mark.parametrize("impl", ["triton", "library"])
def test_the_backward_forms_it_once(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For dz and for the gradient of b, whatever the number of chunks and slices."""
    calls: list[int] = []

    def counted(hidden: Tensor, rows: Tensor, lora: tuple[Tensor, Tensor, float]) -> Tensor:
        calls.append(len(rows))
        return through_adapter(hidden, rows, lora)

    monkeypatch.setattr(triton_backward, "through_adapter", counted)
    adapted = on_device(make_problem((50, 60), V=90, D=20, lora_rank=3).to(torch.float32))
    evaluate(lambda p: fused(p, impl=impl, grad_mode="exact"), adapted)
    assert calls == [int((adapted.aligned != IGNORE).sum())]
