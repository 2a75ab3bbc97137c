"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter (see tests/conftest.py).

Sizes cross every edge of the interpreter's small tiles (16 rows x 32 columns x 16 dimensions): one below, one above,
exactly, and 1.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_dpo import KernelOptions, LMHead, fused_dpo_logps
from fused_dpo.filtering import Filtering
from fused_dpo.gpu import forward as triton_forward
from fused_dpo.gpu import launch
from fused_dpo.gpu import library as triton_library
from fused_dpo.gpu.backward import slice_width
from fused_dpo.gpu.configs import SPLIT_COLUMNS, library_config
from fused_dpo.gpu.launch import architecture
from fused_dpo.ops.token_logps import token_logps
from tests.kernels.support.gpu import DEVICE, TRITON_DTYPES, assert_invariant, on_device
from tests.kernels.support.problems import (
    DIFFERENTIABLE,
    EVERY_FEATURE,
    IGNORE,
    SUBSETS,
    Problem,
    assert_agrees,
    assert_same_bits,
    bits_equal,
    cu_seqlens,
    evaluate,
    fused,
    leaves,
    make_problem,
    present,
    relative_error,
    tokens,
    uninitialized_memory_is_nan,
)

EVERYTHING = {**EVERY_FEATURE, "softcap": 4.0}


def by_triton(problem: Problem, **options: Any) -> Tensor:
    return fused(problem, impl="triton", **options)


def check(problem: Problem, dtype: torch.dtype, needs: Sequence[str] = DIFFERENTIABLE, **options: Any) -> None:
    """Log-probs and gradients within the house's budget of the float64 truth."""
    problem = on_device(problem.to(dtype))
    assert_agrees(evaluate(lambda p: by_triton(p, **options), problem, needs), problem, needs)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 15, 16, 33])
@pytest.mark.parametrize("V", [1, 31, 32, 65])
def test_shapes(V: int, D: int, dtype: torch.dtype) -> None:
    check(make_problem((5, 1, 19), V=V, D=D), dtype)


@pytest.mark.parametrize("lengths", [(1,), (2,), (16, 1), (63,), (40, 0, 17)], ids=str)
def test_row_counts(lengths: tuple[int, ...]) -> None:
    check(make_problem(lengths, V=50, D=17), torch.float32)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": True},
        {"logit_scale": 0.3},
        {"softcap": 4.0},
        {"temperature": 1.9},
        {"lora_rank": 1},
        {"lora_rank": 17},
        EVERYTHING,
        {"padded": True, **EVERYTHING},
        {"shift": False, "average": True, **EVERYTHING},
    ],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_options(settings: dict[str, Any], dtype: torch.dtype) -> None:
    check(make_problem((5, 23, 1, 8), V=67, D=20, **settings), dtype)


@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
def test_every_subset_of_gradients(needs: tuple[str, ...]) -> None:
    check(make_problem((7, 20), V=40, D=9, **EVERYTHING), torch.float32, needs)


def test_several_splits_and_slices() -> None:
    """A vocabulary beyond one split of the forward; a workspace that holds only a part of it in the backward."""
    V = SPLIT_COLUMNS + 300
    problem = make_problem((130, 3), V=V, D=5)
    rows = int((problem.aligned != IGNORE).sum())
    assert slice_width(rows, V, 4, 2**20) < V, "the backward has to take more than one slice"
    check(problem, torch.float32, workspace_mib=1)


@pytest.mark.parametrize("with_stats", [("entropy",), ("mean_logit", "is_top1"), ("entropy", "log_sum_sq_probs")])
def test_stats(with_stats: tuple[str, ...]) -> None:
    problem = on_device(make_problem((9, 30), V=70, D=12, bias=True, softcap=5.0).to(torch.float32))
    got, true = (tokens(p, with_stats, i) for p, i in ((problem, "triton"), (problem.to(torch.float64), "reference")))
    for name in ("logps", *with_stats):
        # fp32 sums of 70 numbers of order 1, 2^-24 each.
        torch.testing.assert_close(getattr(got, name).double(), getattr(true, name).double(), rtol=4e-6, atol=4e-6)
    assert all(getattr(got, name) is None for name in got._fields if name not in ("logps", *with_stats))


def test_run_to_run_and_batch_invariance() -> None:
    assert_invariant(by_triton, V=70)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_no_uninitialised_memory_is_read(dtype: torch.dtype) -> None:
    problem = on_device(make_problem((5, 23), V=67, D=20, **EVERYTHING).to(dtype))
    expected = evaluate(by_triton, problem)
    with uninitialized_memory_is_nan():
        assert_same_bits(evaluate(by_triton, problem), expected, "poisoned buffers")


def test_unscored_rows_are_not_read() -> None:
    problem = on_device(make_problem((5, 23), V=40, D=20).to(torch.float32))
    unscored = (problem.aligned == IGNORE)[:, None]
    poisoned = replace(problem, hidden=problem.hidden.masked_fill(unscored, torch.nan))
    assert_same_bits(evaluate(by_triton, poisoned), evaluate(by_triton, problem), "NaN in unscored rows")


def test_rows_and_tiles_without_upstream_gradient() -> None:
    """Sequences whose gradient is 0, enough of them to fill whole row blocks."""
    problem = on_device(make_problem((30, 60, 20), V=40, D=9).to(torch.float32))
    upstream = torch.tensor([1.0, 0.0, -2.0], device=DEVICE)

    def grads(impl: str) -> tuple[Tensor, ...]:
        fresh = leaves(problem)
        return torch.autograd.grad(fused(fresh, impl=impl), (fresh.hidden, fresh.weight), upstream)

    for ours, true in zip(grads("triton"), grads("reference"), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-5)  # fp32 sums of up to 110 terms of order 1
    assert grads("triton")[0][30:90].abs().max() == 0


@pytest.mark.parametrize("grad_mode", ["exact", "filtered"])
@pytest.mark.parametrize("impl", ["triton", "library"])
def test_an_invalid_label_without_gradient_is_harmless(impl: str, grad_mode: str) -> None:
    """Where labels are not looked at its log-prob is NaN, and none of that reaches the gradients of others."""
    hidden, weight = (torch.randn(*shape, device=DEVICE).requires_grad_() for shape in ((30, 9), (50, 9)))
    target = torch.arange(30, device=DEVICE).index_fill(0, torch.tensor([7], device=DEVICE), 50)
    filtering = Filtering(2**-12 if grad_mode == "filtered" else 0.0, 1 / 16)
    offsets = torch.tensor([0, 30], device=DEVICE)
    logps, *_ = token_logps(hidden, target, offsets, None, LMHead(weight), impl, 1, filtering, want_stats=False)
    assert logps.isnan().nonzero().tolist() == [[7]]
    upstream = torch.ones(30, device=DEVICE).index_fill(0, torch.tensor([7], device=DEVICE), 0.0)
    dhidden, dweight = torch.autograd.grad(logps, (hidden, weight), upstream)
    assert dhidden.isfinite().all()
    assert dweight.isfinite().all()
    assert (dhidden[7] == 0).all()


@pytest.mark.parametrize("impl", ["triton", "library"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_upstream_that_is_not_finite_stays_in_its_row(dtype: torch.dtype, bad: float, impl: str) -> None:
    problem = on_device(make_problem((24,), V=300, D=16, shift=False).to(dtype))
    labels = problem.labels.clamp(min=0)
    fresh = leaves(replace(problem, labels=labels))
    upstream = torch.ones(24, device=DEVICE)
    upstream[3] = bad
    (dhidden,) = torch.autograd.grad(tokens(fresh, [], impl).logps, fresh.hidden, upstream)
    assert dhidden.isfinite().all(1).logical_not().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("softcap", [4.0, 30.0, 1000.0])
def test_softcap_keeps_its_digits(softcap: float) -> None:
    """Logits that are small against the softcap, and such that are not, against float64."""
    weight = torch.linspace(-8.0, 8.0, 80)[:, None]
    head = LMHead(weight.to(DEVICE), softcap=softcap)
    hidden, labels, offsets = torch.ones(80, 1), torch.arange(80), torch.arange(81)
    got = fused_dpo_logps(
        hidden.to(DEVICE), head, labels.to(DEVICE), cu_seqlens=offsets.to(DEVICE), shift=False,
        options=KernelOptions(impl="triton"),
    )  # fmt: skip
    true = (softcap * torch.tanh(weight[:, 0].double() / softcap)).log_softmax(0)
    assert (got.cpu().double() - true).abs().max() < 3e-6  # log-probs of up to -18, whose neighbours are 1.9e-6 apart


def test_nan_in_the_upstream_gradient_comes_out() -> None:
    problem = on_device(make_problem((5,), V=40, D=9).to(torch.float32))
    fresh = leaves(problem)
    (dweight,) = torch.autograd.grad(by_triton(fresh), fresh.weight, torch.tensor([torch.nan], device=DEVICE))
    assert dweight.isnan().all()


def test_confident_target() -> None:
    """p = 1 - 3.7e-4, where the kernel forms 1 - p by a series."""
    weight = torch.full((4, 1), -9.0, device=DEVICE)
    weight[2] = 0.0
    hidden = torch.ones(1, 1, device=DEVICE, requires_grad=True)
    options = KernelOptions(impl="triton")
    labels, offsets = torch.tensor([2], device=DEVICE), cu_seqlens([1]).to(DEVICE)
    logps = fused_dpo_logps(hidden, weight, labels, cu_seqlens=offsets, shift=False, options=options)
    (grad,) = torch.autograd.grad(logps.sum(), hidden)
    rest = 3 * math.exp(-9)
    # The sum 1 + rest is held in fp32: eps / rest of relative precision is what there is.
    assert grad.item() == pytest.approx(9 * rest / (1 + rest), rel=1.2e-7 / rest)


@pytest.mark.parametrize(("scale", "offset"), [(3e3, 0.0), (1.0, 1e3), (0.0, 0.0)], ids=["large", "offset", "flat"])
def test_extreme_logits(scale: float, offset: float) -> None:
    """Logits of +-1e4, a common offset, and none at all."""
    problem = make_problem((20, 7), V=50, D=8)
    problem = replace(problem, weight=problem.weight * scale, bias=torch.full((50,), offset, dtype=torch.float64))
    check(problem, torch.float32)


def test_minus_infinity_in_the_bias() -> None:
    """A token that is ruled out has probability 0 and no gradient; a whole split of them does no harm."""
    V = SPLIT_COLUMNS + 40
    problem = on_device(make_problem((6, 9), V=V, D=4).to(torch.float32))
    bias = torch.zeros(V, device=DEVICE)
    bias[:SPLIT_COLUMNS] = -torch.inf
    labels = problem.labels.clamp(min=IGNORE)
    labels = torch.where(labels >= 0, SPLIT_COLUMNS + labels % 40, labels)
    problem = replace(problem, bias=bias, labels=labels)
    got, true = evaluate(by_triton, problem), evaluate(lambda p: fused(p, impl="reference"), problem)
    # fp32 sums in another order, of terms of order 1.
    torch.testing.assert_close(got.logps, true.logps, rtol=1e-5, atol=1e-5)
    for name in ("hidden", "weight"):
        torch.testing.assert_close(got.grads[name], true.grads[name], rtol=1e-4, atol=1e-5)


def test_fp16_gradients_do_not_underflow() -> None:
    """Upstream gradients of 1e-6, as a large batch has them: dz in plain fp16 would be 0."""
    problem = on_device(make_problem((30,), V=40, D=9).to(torch.float16))
    fresh = leaves(problem)
    (dweight,) = torch.autograd.grad(by_triton(fresh).sum() * 1e-3, fresh.weight)
    (true,) = torch.autograd.grad(fused(fresh.to(torch.float64), impl="reference").sum() * 1e-3, fresh.weight)
    assert (dweight - true).norm() < 0.02 * true.norm()  # fp16 results near 1e-3 have 4e-4 relative precision


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_strided_inputs(dtype: torch.dtype) -> None:
    """Transposed weight and every other row of hidden states, without a copy by the caller."""
    problem = on_device(make_problem((5, 20), V=40, D=20).to(dtype))
    wide = torch.stack((problem.hidden, torch.full_like(problem.hidden, torch.nan)), dim=1)
    strided = replace(problem, hidden=wide[:, 0], weight=problem.weight.T.contiguous().T)
    assert not strided.weight.is_contiguous()
    assert bits_equal(by_triton(strided), by_triton(problem))


@pytest.mark.parametrize("grad_mode", ["exact", "filtered"])
def test_positions_beyond_32_bits(grad_mode: str) -> None:
    """Operands whose columns lie 2^26 numbers apart, as in a transposed head of more than 2^31: the bits of copies.

    An offset that has wrapped around ends the process.
    """
    apart, D = 2**26, 40
    problem = on_device(make_problem((5, 20), V=40, D=D, lora_rank=3).to(torch.float16))
    memory = torch.empty(D * apart, dtype=torch.float16, device=DEVICE)  # of which a few pages are touched
    assert memory.numel() > 2**31
    far_hidden = memory.as_strided(problem.hidden.shape, (1, apart)).copy_(problem.hidden)
    far_weight = memory.as_strided(problem.weight.shape, (1, apart), 64).copy_(problem.weight)
    far = replace(problem, hidden=far_hidden, weight=far_weight)

    def results(p: Problem) -> tuple[Tensor, ...]:
        operands = p.hidden.requires_grad_(), p.weight.requires_grad_()
        logps = by_triton(p, grad_mode=grad_mode)
        return (logps, *torch.autograd.grad(logps[0] - logps[1], operands))

    for got, expected in zip(results(far), results(problem), strict=True):
        assert bits_equal(got, expected)


@pytest.mark.parametrize("grad_mode", ["exact", "filtered"])
@pytest.mark.parametrize("impl", ["triton", "library"])
def test_a_weight_in_fp32_is_converted_in_slices(impl: str, grad_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As autocast leaves it: the bits of a weight in fp16, but for its own gradient, which is not rounded to that."""
    V, split = 600, 64
    slices: list[launch.WeightSlice] = []

    def of_one_split(weight: Tensor, dtype: torch.dtype, rows: int) -> Iterator[launch.WeightSlice]:
        fits = split if impl == "triton" and weight.dtype != dtype else rows
        for part in launch.weight_slices(weight, dtype, fits):
            slices.append(part)
            yield part

    monkeypatch.setattr(triton_forward, "SPLIT_COLUMNS", split)
    monkeypatch.setattr(triton_forward, "weight_slices", of_one_split)
    monkeypatch.setattr(triton_library, "weight_slices", of_one_split)
    problem = on_device(make_problem((9, 32), V=V, D=20, shift=False).to(torch.float16))
    target = problem.labels.masked_fill(problem.labels == IGNORE, -1)
    filtering = Filtering(2**-12 if grad_mode == "filtered" else 0.0, 1 / 16)
    results = []
    for dtype in (torch.float16, torch.float32):
        hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.to(dtype).requires_grad_()
        offsets = present(problem.cu_seqlens).long()
        logps, *_ = token_logps(hidden, target, offsets, None, LMHead(weight), impl, 1, filtering, want_stats=False)
        results.append((logps.detach(), *torch.autograd.grad(logps.sum(), (hidden, weight))))
    of_library = range(0, V, library_config(architecture(torch.device(DEVICE)), torch.float16).slice_columns)
    once_each = [0, *range(0, V, split)] if impl == "triton" else [*of_library, *of_library]
    assert [part.first for part in slices] == once_each
    assert {part.values.dtype for part in slices} <= {torch.float16}
    (logps, dhidden, dweight), (*same, dweight_fp32) = results
    assert dweight_fp32.dtype == torch.float32
    assert bits_equal(same[0], logps)
    assert relative_error(same[1], dhidden) < 2**-11  # slices of another width: another order of fp32 sums
    # Rounded to fp16 from sums in another order: one step, 2^-10 of a number, and 2^-24 below the normal ones.
    torch.testing.assert_close(dweight_fp32.half(), dweight, rtol=2**-10, atol=2**-24)


def test_autocast_keeps_the_weight_in_fp32() -> None:
    if DEVICE == "cpu":
        pytest.skip("autocast to half precision of the interpreter's CPU tensors is bfloat16, which it cannot multiply")
    problem = on_device(make_problem((5, 20), V=40, D=20).to(torch.float32))
    weight = problem.weight.clone().requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        by_triton(replace(problem, weight=weight)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("grad_mode", ["exact", "filtered"])
@pytest.mark.parametrize("impl", ["triton", "library", "streaming"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_default_dtype_changes_nothing(impl: str, grad_mode: str, default: torch.dtype) -> None:
    """Loaders of models set it, and what is allocated here must not follow."""
    problem = on_device(make_problem((5, 20), V=300, D=20, bias=True).to(torch.float32))
    upstream = torch.tensor([0.7, -1.3], device=DEVICE)

    def results() -> tuple[Tensor, ...]:
        fresh = leaves(problem)
        logps = fused(fresh, impl=impl, grad_mode=grad_mode)
        return logps.detach(), *torch.autograd.grad(logps, (fresh.hidden, fresh.weight), upstream)

    expected, before = results(), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = results()
    finally:
        torch.set_default_dtype(before)
    assert all(map(bits_equal, got, expected))


def test_choice_of_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = torch.randn(1, 3, 4), torch.randn(5, 4), torch.zeros(1, 3, dtype=torch.long)

    def call(h: Tensor, w: Tensor) -> Tensor:
        return fused_dpo_logps(h, w, labels, options=KernelOptions(impl="triton"))

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TypeError, match="float64"):
        call(hidden.double(), weight.double())
    with pytest.raises(TypeError, match="bfloat16"):
        call(hidden.bfloat16(), weight.bfloat16())
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        call(hidden, weight)
