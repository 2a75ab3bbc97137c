"""Precision that nobody's global setting changes: matmul flags, autocast, and what is accumulated in what."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_dpo import LMHead, fused_dpo_logps
from fused_dpo.linalg.matmul import add_matmul_fp32, fp32_sums, matmul_fp32, matmul_precision
from fused_dpo.streaming import exact, kept_products, tiles
from tests.kernels.support.problems import (
    Problem,
    assert_close,
    assert_same_bits,
    assert_within_budget,
    cu_seqlens,
    evaluate,
    fused,
    make_problem,
    naive_logps,
    present,
    relative_error,
)

pytestmark = pytest.mark.cpu_units


@pytest.fixture(autouse=True)
def _restore_flags() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def flags() -> tuple[object, ...]:
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # pyright: ignore[reportAttributeAccessIssue]
    return torch.get_float32_matmul_precision(), cpu.fp32_precision, cuda.fp32_precision


def test_sums_in_fp16_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a program lets cuBLAS add up fp16 in fp16, torch gives no product of fp16 a result in fp32."""
    matmul, seen = torch.backends.cuda.matmul, []
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, lambda *_, **__: seen.append(matmul.allow_fp16_accumulation))
    monkeypatch.setattr(Tensor, "is_cuda", True)
    a = torch.ones(2, 2, dtype=torch.float16)
    matmul.allow_fp16_accumulation = True
    try:
        matmul_fp32(a, a)
        add_matmul_fp32(a, a, a)
        with fp32_sums():
            assert not matmul.allow_bf16_reduced_precision_reduction
        assert matmul.allow_bf16_reduced_precision_reduction
        assert matmul.allow_fp16_accumulation
    finally:
        matmul.allow_fp16_accumulation = False
    assert seen == [False, False]


@pytest.mark.parametrize("before", [(True, True), (False, True), (False, False)])
def test_how_cublas_sums_bf16_is_given_back(before: tuple[bool, bool]) -> None:
    """With the switch beside it, which forbids cuBLAS to split products."""

    def settings() -> tuple[bool, bool]:
        matmul: Any = torch.backends.cuda.matmul
        return matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k

    matmul: Any = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = before
    try:
        with fp32_sums():
            assert settings() == (False, before[1])
        assert settings() == before
    finally:
        matmul.allow_bf16_reduced_precision_reduction = True


@pytest.mark.parametrize("flag", ["high", "medium"])
@pytest.mark.parametrize("features", [{}, {"bias": True, "lora_rank": 8}], ids=["plain", "lora"])
def test_matmul_flag_does_not_reach_fp32(features: dict, flag: str) -> None:
    """TF32 and bf16 short cuts that a program switches on for its own matmuls change no bit here, and stay on."""
    problem = make_problem((130, 70), V=1000, D=64, **features).to(torch.float32)
    expected = evaluate(fused, problem)
    torch.set_float32_matmul_precision(flag)
    before = flags()
    got = evaluate(fused, problem)
    assert flags() == before
    assert before[0] == flag
    assert_same_bits(got, expected, f"under {flag!r}")


def test_control_the_flag_changes_plain_matmuls() -> None:
    """Negative control, where the machine has bf16 units."""
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    exact = a @ b
    torch.set_float32_matmul_precision("medium")
    if torch.equal(a @ b, exact):
        pytest.skip("this machine multiplies fp32 matrices in fp32 whatever the flag says")
    with matmul_precision(torch.float32):
        assert torch.equal(a @ b, exact)
    assert not torch.equal(a @ b, exact)


@pytest.mark.parametrize("flag", ["highest", "high", "medium"])
@pytest.mark.parametrize("where", ["product", "accumulate_product", "filtered"])
def test_flags_survive_an_exception(where: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("out of memory, say")

    problem = make_problem(V=1000).to(torch.bfloat16)
    if where == "filtered":  # peaked, or there would be nothing to choose, and the backward would be the exact one
        problem = replace(problem, weight=4 * problem.weight)
    problem = problem.map(Tensor.requires_grad_)
    torch.set_float32_matmul_precision(flag)
    before = flags()
    if where == "product":
        monkeypatch.setattr(tiles, "product", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            fused(problem, grad_mode="exact")
    elif where == "filtered":
        # On a CPU with bf16 units the forward multiplies what the coarse screen kept; else only the backward does.
        monkeypatch.setattr(kept_products, "product", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            fused(problem).sum().backward()
    else:
        loss = fused(problem, grad_mode="exact").sum()
        monkeypatch.setattr(exact, "accumulate_product", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            loss.backward()
    assert flags() == before


@contextmanager
def autocast(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    with torch.autocast("cpu", dtype):
        yield


def under_autocast(function: Callable[[Problem], Tensor]) -> Callable[[Problem], Tensor]:
    def call(problem: Problem) -> Tensor:
        with autocast():
            return function(problem)

    return call


@pytest.mark.parametrize("features", [{}, {"bias": True, "lora_rank": 4}], ids=["plain", "lora"])
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_autocast_with_fp32_head(impl: str, hidden_dtype: torch.dtype, features: dict) -> None:
    """The usual mixed-precision set-up: computed in bf16, gradients in each input's own dtype, within bf16's budget."""
    problem = make_problem((130, 70), V=500, D=64, **features).to(torch.float32)
    rounded = problem.to(torch.bfloat16)  # what autocast multiplies; the bias too, in eager code
    problem = Problem(**{**problem.__dict__, "hidden": rounded.hidden.to(hidden_dtype)})
    got = evaluate(under_autocast(lambda p: fused(p, impl=impl)), problem)
    eager = evaluate(under_autocast(naive_logps), problem)
    # The truth multiplies the rounded matrices and adds the bias as it is.
    truth = evaluate(
        naive_logps, Problem(**{**rounded.to(torch.float64).__dict__, "bias": double_or_none(problem.bias)})
    )
    assert got.logps.dtype == torch.float32
    assert_within_budget("logps", got.logps, eager.logps, truth.logps)
    for name, grad in got.grads.items():
        assert present(grad).dtype == getattr(problem, name).dtype
        assert_within_budget(f"d{name}", present(grad), present(eager.grads[name]), present(truth.grads[name]))


def double_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def test_autocast_weight_gradient_is_not_rounded() -> None:
    """dW of an fp32 head keeps its fp32 accumulation: far from a bf16 grid, closer to the truth than bf16 can be."""
    problem = make_problem((200, 150), V=300, D=64).to(torch.bfloat16)
    problem = Problem(**{**problem.__dict__, "weight": problem.weight.float()})
    grad = present(evaluate(under_autocast(fused), problem).grads["weight"])
    assert (grad != grad.bfloat16().float()).float().mean() > 0.9


def test_autocast_leaves_other_calls_alone() -> None:
    """Same-dtype half precision and float64 are what they are with and without autocast."""
    for dtype in (torch.bfloat16, torch.float64):
        problem = make_problem().to(dtype)
        assert_same_bits(evaluate(under_autocast(fused), problem), evaluate(fused, problem), str(dtype))


def test_backward_outside_of_autocast() -> None:
    """Autograd runs the backward without the forward's autocast, or within somebody else's: same bits."""
    problem = make_problem((130, 70), bias=True, lora_rank=4).to(torch.float32).map(Tensor.requires_grad_)
    grads = []
    for around_backward in (False, True):
        with autocast():
            loss = fused(problem).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=around_backward):
            grads.append(torch.autograd.grad(loss, tuple(problem.tensors.values())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_never_rounded(dtype: torch.dtype) -> None:
    """Half-precision inputs are exact numbers: log-probs have fp32's error, hundreds of times below eager's."""
    problem = make_problem((300,), V=1000, D=256).to(dtype)
    truth = naive_logps(problem.to(torch.float64))
    error, eager_error = relative_error(fused(problem), truth), relative_error(naive_logps(problem), truth)
    assert error < 1e-7  # fp32 rounding of the sum over 200 tokens; their own errors average out
    assert error < eager_error / 100


def test_weight_gradient_does_not_drift_over_tokens() -> None:
    """dW accumulated in bf16 over chunks loses what each chunk adds; in fp32 its error does not grow with tokens."""
    T, V, D = 4096, 16, 64
    hidden = (torch.rand(T, D) + 0.5).bfloat16()  # one sign: the contributions of all tokens add up
    problem = Problem(hidden, torch.zeros(V, D).bfloat16(), torch.zeros(T).long(), cu_seqlens([T]), shift=False)
    truth = present(evaluate(naive_logps, problem.to(torch.float64)).grads["weight"])
    # All tokens have the same dz here, so its rounding to bf16 does not average out: 2^-9, and 2^-9 for the result.
    assert relative_error(evaluate(fused, problem).grads["weight"], truth) < 2**-8
    drifting = torch.zeros(V, D).bfloat16()  # negative control
    dz = problem.weight.new_full((T, V), 1.3 / V)
    for start in range(0, T, 64):
        drifting += dz[start : start + 64].T @ hidden[start : start + 64]
    assert relative_error(drifting[1:], truth[1:]) > 2 * 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_over_long_sequences(dtype: torch.dtype) -> None:
    """20000 equal tokens: summed in float64 and rounded once, where an fp32 running sum drifts by 1e-5."""
    T = 20000
    hidden, weight = torch.ones(T, 1, dtype=dtype), torch.tensor([[0.25], [-1.0], [0.5]], dtype=dtype)
    logps = fused_dpo_logps(hidden, LMHead(weight), torch.zeros(T).long(), cu_seqlens=cu_seqlens([T]), shift=False)
    one = fused_dpo_logps(hidden[:1], LMHead(weight), torch.zeros(1).long(), cu_seqlens=cu_seqlens([1]), shift=False)
    assert_close("sum", logps, (one.double() * T).float(), 1e-7)  # one unit is 6e-8 at least
