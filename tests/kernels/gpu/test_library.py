"""`impl="library"`: the Triton kernels on products of the library's matmul.

What the kernels compute is tested with the products that they form themselves; here are the edges of chunks, slices and
splits (in the interpreter 32 rows, 128 and 64 columns), and what a product that is given can get wrong.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fused_dpo.gpu import library as triton_library
from fused_dpo.gpu.backward import slice_width
from fused_dpo.gpu.filtered.blocks import triton_screen_shape
from fused_dpo.gpu.merge import empty_results
from fused_dpo.head import HeadInputs
from tests.kernels.support.gpu import LIBRARY, TRITON_DTYPES, assert_invariant, on_device
from tests.kernels.support.problems import (
    DIFFERENTIABLE,
    EVERY_FEATURE,
    Problem,
    assert_agrees,
    assert_same_bits,
    bits_equal,
    evaluate,
    fused,
    make_problem,
    present,
    relative_error,
    tokens,
    uninitialized_memory_is_nan,
)

EVERYTHING = {**EVERY_FEATURE, "softcap": 4.0}
CHUNK, SLICE, SPLIT = LIBRARY.chunk_rows, LIBRARY.slice_columns, LIBRARY.split_columns


def by_library(problem: Problem, **options: Any):
    return fused(problem, impl="library", **options)


def check(problem: Problem, dtype: torch.dtype, needs: Sequence[str] = DIFFERENTIABLE, **options: Any) -> None:
    problem = on_device(problem.to(dtype))
    assert_agrees(evaluate(lambda p: by_library(p, **options), problem, needs), problem, needs)


@pytest.mark.parametrize("V", [1, SPLIT - 1, SPLIT, SPLIT + 1, SLICE - 1, SLICE, SLICE + 1, 2 * SLICE + SPLIT + 3])
def test_columns_at_every_edge(V: int) -> None:
    check(make_problem((5, 1, 19), V=V, D=17), torch.float32)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 17])
def test_rows_at_every_edge(rows: int) -> None:
    problem = make_problem((rows,), V=SLICE + 30, D=17, shift=False)
    check(replace(problem, labels=problem.labels.clamp(min=0)), torch.float32)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": True}, {"logit_scale": 0.3}, {"lora_rank": 17}, EVERYTHING, {"padded": True, **EVERYTHING}],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_options(settings: dict[str, Any], dtype: torch.dtype) -> None:
    check(make_problem((5, 23, 1, 38), V=SLICE + 67, D=20, **settings), dtype)


def test_several_slices_of_the_backward() -> None:
    """The workspace holds less than the vocabulary, and a product less than the workspace."""
    rows, V = 260, 900
    assert SLICE < slice_width(rows, V, 4, 2**20) < V
    problem = make_problem((rows,), V=V, D=5, bias=True, shift=False)
    check(replace(problem, labels=problem.labels.clamp(min=0)), torch.float32, workspace_mib=1)


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias", "lora_b"), ("lora_a",)], ids="+".join)
def test_subsets_of_gradients(needs: tuple[str, ...]) -> None:
    problem = on_device(make_problem((7, 40), V=SLICE + 40, D=9, **EVERYTHING).to(torch.float32))
    part, everything = evaluate(by_library, problem, needs), evaluate(by_library, problem)
    for name in DIFFERENTIABLE:
        assert bits_equal(part.grads[name], everything.grads[name] if name in needs else None), name


def test_stats() -> None:
    names = ["entropy", "mean_logit", "is_top1", "log_sum_sq_probs"]
    problem = on_device(make_problem((9, 50), V=SLICE + 70, D=12, bias=True, softcap=5.0).to(torch.float32))
    got, true = (tokens(p, names, i) for p, i in ((problem, "library"), (problem.to(torch.float64), "reference")))
    for name in ("logps", *names):
        # fp32 sums of numbers of order 1, 64 of them at a time, 2^-24 each.
        torch.testing.assert_close(getattr(got, name).double(), getattr(true, name).double(), rtol=4e-6, atol=4e-6)


def peaked(**settings: Any) -> Problem:
    """Logits of standard deviation 15, over several chunks, slices and splits."""
    problem = make_problem((30, 24, 1), V=3 * SLICE + 20, D=16, **settings)
    return on_device(replace(problem, weight=problem.weight * 5))


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("settings", [{}, {"bias": True, "lora_rank": 3, "softcap": 60.0}], ids=["plain", "everything"])
def test_filtered(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Near the exact gradients, as the same filter is on products formed in the kernel, and not equal to them."""
    problem = peaked(**settings).to(dtype)
    exact = evaluate(by_library, problem)
    got = evaluate(lambda p: by_library(p, grad_mode="filtered"), problem)
    rough = evaluate(lambda p: by_library(p, grad_mode="filtered", filter_eps=2**-5), problem)
    assert bits_equal(got.logps, exact.logps), "a screen changes nothing in the forward"
    for name in ("hidden", "weight"):
        true = present(exact.grads[name])
        # A tenth of the theorem's 2.2 % of dz; fp16 rounds dz and the gradients on top.
        limit = 2e-3 if dtype == torch.float32 else 4e-3
        assert relative_error(present(got.grads[name]), true) <= limit, name
        assert relative_error(present(rough.grads[name]), true) > limit, "the filter drops something"


def test_run_to_run_and_batch_invariance() -> None:
    assert_invariant(by_library, V=SLICE + 70)


@pytest.mark.parametrize("eps", [0.0, 2**-12])
@pytest.mark.parametrize("all_scored", [False, True])
def test_chunks_that_do_not_fit_into_the_workspace_together(all_scored: bool, eps: float) -> None:
    """A chunk at a time, and all at once: the same bits."""
    problem = on_device(make_problem((2 * CHUNK + 20,), V=SLICE + 70, D=9, shift=False).to(torch.float32))
    target = problem.labels.clamp(min=0) if all_scored else problem.labels
    rows = (target >= 0).nonzero().squeeze(1)
    assert all_scored == (len(rows) == len(target))
    assert len(rows) > CHUNK
    shape = (triton_screen_shape(problem.hidden, problem.head, len(target))) if eps else None
    scans = []
    for workspace_mib in (0, 64):
        scans.append(empty_results(problem.hidden, want_stats=False, screen_shape=shape))
        inputs = HeadInputs(problem.hidden, target, rows, problem.head, workspace_mib)
        triton_library.library_scan(inputs, scans[-1], eps)
    (logps, state, _, screen), other = scans
    assert bits_equal(logps, other.logps)
    assert bits_equal(state.values, other.state.values)
    assert not eps or bits_equal(present(screen), present(other.screen))


def test_products_have_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batch: for another shape the library may choose a kernel that sums in another order."""
    shapes: list[tuple[torch.Size, torch.Size]] = []
    multiply = triton_library.matmul_fp32

    def noted(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        shapes.append((a.shape, b.shape))
        return multiply(a, b, out=out)

    monkeypatch.setattr(triton_library, "matmul_fp32", noted)
    seen = []
    for rows in (1, CHUNK, 2 * CHUNK + 3):
        shapes.clear()
        with torch.no_grad():
            by_library(on_device(make_problem((rows,), V=SLICE + 7, D=9, shift=False).to(torch.float32)))
        seen.append(set(shapes))
    assert seen[0] == seen[1] == seen[2] == {((CHUNK, 9), (9, SLICE)), ((CHUNK, 9), (9, 7))}


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("grad_mode", ["exact", "filtered"])
def test_no_uninitialised_memory_is_read(grad_mode: str, dtype: torch.dtype) -> None:
    problem = on_device(make_problem((5, 43), V=SLICE + 67, D=20, **EVERYTHING).to(dtype))
    expected = evaluate(lambda p: by_library(p, grad_mode=grad_mode), problem)
    with uninitialized_memory_is_nan():
        assert_same_bits(evaluate(lambda p: by_library(p, grad_mode=grad_mode), problem), expected, "poisoned buffers")


def test_what_is_not_finite_stays_in_its_sequence() -> None:
    problem = on_device(make_problem((20, 30), V=SLICE + 7, D=9).to(torch.float32))
    poisoned = problem.hidden.clone()
    poisoned[20:] = torch.nan
    got = by_library(replace(problem, hidden=poisoned))
    assert got[1].isnan()
    assert bits_equal(got[:1], by_library(problem)[:1])
