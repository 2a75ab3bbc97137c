"""Bits: the same from run to run, and for one sequence the same whatever else is in the batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fused_dpo import KernelOptions, fused_dpo_logps
from fused_dpo.linalg.operands import Operands
from fused_dpo.linalg.sizes import even_bounds
from fused_dpo.streaming import tiles
from fused_dpo.streaming.tiles import ROWS_PER_TILE, row_multiple, rows_per_tile, slice_width
from tests.kernels.support.problems import (
    DTYPES,
    EVERY_FEATURE,
    IGNORE,
    Problem,
    assert_same_bits,
    bits_equal,
    compose,
    cu_seqlens,
    dtype_id,
    evaluate,
    fused,
    make_problem,
    tokens,
)

pytestmark = pytest.mark.cpu_units

LENGTHS = (1, 63, 130, 2, 64, 300, 0, 257, 65)  # scored rows and their sums lie around multiples of 64 and 256
TOKENS = 1400  # a full tile and a part of one
EVERYTHING = {**EVERY_FEATURE, "lora_rank": 8}
HEADS = {"plain": {}, "everything": EVERYTHING}
SIZES = {"one slice": (1000, 64), "many slices": (5003, 48)}  # V, D


@contextmanager
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def padded(problem: Problem, extra: int, filler: float) -> Problem:
    """The same sequences as rows of a padded batch."""
    S = max(b - a for a, b in problem.spans) + extra
    hidden = problem.hidden.new_full((len(problem.spans), S, problem.hidden.shape[-1]), filler)
    labels = problem.labels.new_full((len(problem.spans), S), IGNORE)
    for i, (a, b) in enumerate(problem.spans):
        hidden[i, : b - a], labels[i, : b - a] = problem.hidden[a:b], problem.labels[a:b]
    return replace(problem, hidden=hidden, labels=labels, cu_seqlens=None)


def logps_of(problem: Problem) -> Tensor:
    return fused(problem, workspace_mib=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_run_to_run(dtype: torch.dtype) -> None:
    problem = make_problem(LENGTHS, V=2003, D=48, **EVERYTHING).to(dtype)
    first = evaluate(logps_of, problem)
    for _ in range(2):
        assert_same_bits(evaluate(logps_of, problem.map(Tensor.clone)), first, "again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_two_threads(dtype: torch.dtype) -> None:
    """The rest of the suite runs on one thread; with two, run to run and batch composition hold as well."""
    problem = make_problem((1, 130, 64), V=1000, D=64).to(dtype)
    with two_threads():
        together = evaluate(logps_of, problem)
        assert_same_bits(evaluate(logps_of, problem), together, "again")
        for order in ([1], [2, 0]):
            assert bits_equal(logps_of(compose(problem, order)), together.logps[order])


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_batch_composition(dtype: torch.dtype, size: tuple[int, int], head: dict) -> None:
    """Alone, in any order, beside any other sequence, packed or padded, with or without gradient."""
    V, D = size
    problem = make_problem(LENGTHS, V, D, **head).to(dtype)
    everyone = list(range(len(LENGTHS)))
    together = logps_of(problem)
    for order in (everyone[::-1], [7, 0, 3], [5, 5, 1, 5], [2, 8, 6, 4], torch.randperm(len(everyone)).tolist()):
        assert bits_equal(logps_of(compose(problem, order)), together[order]), f"order {order}"
    for i in everyone:
        assert bits_equal(logps_of(compose(problem, [i])), together[[i]]), f"sequence {i} alone"
    for extra, filler in ((0, 0.0), (1, torch.nan), (70, 3.0)):
        assert bits_equal(logps_of(padded(problem, extra, filler)), together), f"padded by {extra} more"
    assert bits_equal(evaluate(logps_of, problem).logps, together), "with gradient"
    assert bits_equal(evaluate(logps_of, problem, ["hidden"]).logps, together), "with a frozen head"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("V", "D"), [(7, 33), (11, 65), (2, 17), (5, 4), (33, 576), (100, 33), (257, 65)])
def test_batch_composition_of_odd_heads(V: int, D: int, dtype: torch.dtype) -> None:
    """BLAS picks other inner loops by shape and by a row's place in the tile: any head, and any token on its own."""
    problem = make_problem((TOKENS,), V, D, shift=False).to(dtype)
    assert_tokens_do_not_depend_on_company(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_batch_composition_of_a_transposed_weight(dtype: torch.dtype) -> None:
    """BLAS answers for one with bits that depend on a row's place."""
    for seed in (1, 8, 21, 51, 74):
        rng = torch.Generator().manual_seed(seed)
        weight = (torch.randn(256, 5, generator=rng) / 4).to(dtype).T
        hidden, labels = torch.randn(194, 256, generator=rng).to(dtype), torch.randint(0, 5, (194,), generator=rng)
        arguments: Any = {"shift": False, "grad_mode": "filtered", "options": KernelOptions(impl="streaming")}
        both = fused_dpo_logps(hidden, weight, labels, cu_seqlens=torch.tensor([0, 129, 194]), **arguments)
        alone = fused_dpo_logps(hidden[129:], weight, labels[129:], cu_seqlens=torch.tensor([0, 65]), **arguments)
        assert torch.equal(alone, both[1:]), f"seed {seed}"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rank", [1, 4, 13])
def test_batch_composition_with_odd_adapters(rank: int, dtype: torch.dtype) -> None:
    assert_tokens_do_not_depend_on_company(make_problem((TOKENS,), 257, 33, lora_rank=rank, shift=False).to(dtype))


def assert_tokens_do_not_depend_on_company(problem: Problem) -> None:
    """Of the exact path: the filtered one promises it for whole sequences."""

    def logps_of_rows(rows: Tensor) -> Tensor:
        offsets = cu_seqlens([len(rows)])
        part = replace(problem, hidden=problem.hidden[rows], labels=problem.labels[rows], cu_seqlens=offsets)
        return tokens(part, grad_mode="exact").logps

    together = logps_of_rows(torch.arange(TOKENS))
    for count in (1, 2, 63, 65, 130, 200, 257, 321, 513, 1025):
        rows = torch.randperm(TOKENS)[:count]
        differing = int((logps_of_rows(rows) != together[rows]).sum())
        assert differing == 0, f"{differing} of {count} token log-probs differ from those among {TOKENS}"


@pytest.mark.parametrize(("same_above", "expected"), [(0, 64), (64, 128), (128, 256), (300, 512), (900, 1000)])
def test_row_multiple_is_found_by_trying(same_above: int, expected: int) -> None:
    """Fewer rows than the tried machine computes alike are padded, and never fewer than 64."""
    with mock.patch.object(torch, "equal", side_effect=lambda a, b: len(a) > same_above and len(a) == len(b)):
        assert row_multiple.__wrapped__(96, torch.bfloat16, 1000, 1) == expected


def test_rows_of_a_tile_by_workspace() -> None:
    """A block's hidden states, gathered, take a quarter of the workspace at most, and never fewer than 64 rows."""
    assert rows_per_tile(576, 128, torch.float32) == ROWS_PER_TILE
    assert rows_per_tile(8192, 128, torch.float32) == 512
    assert rows_per_tile(8192, 128, torch.float64) == 256
    assert rows_per_tile(64, 1, torch.bfloat16) == 512  # held in fp32
    assert rows_per_tile(8192, 1, torch.float32) == 64


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rows_that_follow_each_other_are_not_copied(dtype: torch.dtype) -> None:
    """Unless a product would take them otherwise: another dtype, other rows between them, padding, odd addresses."""
    problem = make_problem((200,), V=100, D=64).to(dtype)

    def is_view(hidden: Tensor, rows: Tensor, out_rows: int = 64, start: int = 0) -> bool:
        operands = Operands(hidden, rows, problem.head)
        out = operands.buffer(out_rows)
        taken = operands.hidden_rows(start, start + 64, out)
        assert torch.equal(taken[:64], hidden[rows[start : start + 64]].to(taken.dtype))
        assert not taken[64:].any()
        return taken.data_ptr() != out.data_ptr()

    run, full = torch.arange(30, 158), dtype.itemsize >= 4
    assert is_view(problem.hidden, run) == full
    assert is_view(problem.hidden, run, start=64) == full
    assert not is_view(problem.hidden, run, out_rows=128)
    assert not is_view(problem.hidden, run + (run >= 100).long())
    assert not is_view(torch.cat((problem.hidden, problem.hidden), 1)[:, :64], run)
    odd = torch.empty(problem.hidden.numel() + 1, dtype=dtype)[1:].view_as(problem.hidden).copy_(problem.hidden)
    assert not is_view(odd, run)


@pytest.mark.parametrize("grad_mode", ["exact", "filtered"])
def test_torchs_default_device_changes_nothing(grad_mode: str) -> None:
    """Loaders of models set it, to meta among others, and what is allocated here must not follow."""
    problem = make_problem((30, 40), V=500, D=33).to(torch.bfloat16)
    expected = evaluate(lambda p: fused(p, grad_mode=grad_mode), problem)
    row_multiple.cache_clear()
    with torch.device("meta"):
        logps = fused(problem.map(Tensor.requires_grad_), grad_mode=grad_mode)
        grads = torch.autograd.grad(logps, (problem.hidden, problem.weight), torch.ones_like(logps, device="cpu"))
    assert bits_equal(logps.detach(), expected.logps)
    assert all(grad.device.type == "cpu" and bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("multiple", [64, 256])
def test_rows_are_padded_to_the_multiple(multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem((65,), V=100, D=33, shift=False)
    problem = replace(problem, labels=problem.labels.clamp(min=0)).to(torch.bfloat16)
    expected = fused(problem, grad_mode="exact")
    seen: list[int] = []
    read_hidden = Operands.read_hidden

    def noted(self: Operands, start: int, stop: int, out: Tensor) -> Tensor:
        seen.append(len(out))
        return read_hidden(self, start, stop, out)

    monkeypatch.setattr(Operands, "read_hidden", noted)
    monkeypatch.setattr(tiles, "row_multiple", lambda K, dtype, tile_rows, threads: multiple)
    # 2 eps of the sum of 65 log-probs; another multiple may have other bits, which is why it is found by trying.
    torch.testing.assert_close(
        fused(problem, grad_mode="exact"), expected, rtol=2 * torch.finfo(torch.float32).eps, atol=0
    )
    assert set(seen) == {max(128, multiple)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_hidden_gradient_of_a_sequence_is_its_own(dtype: torch.dtype) -> None:
    """Not promised for the gradient, but worth knowing when it changes: dH has the same bits in any company too."""
    problem = make_problem(LENGTHS, V=1000, D=64).to(dtype).map(Tensor.requires_grad_)
    (together,) = torch.autograd.grad(logps_of(problem).sum(), problem.hidden)
    order = [7, 0, 3]
    alone = compose(problem, order).map(lambda t: t.detach().requires_grad_())
    (parts,) = torch.autograd.grad(logps_of(alone).sum(), alone.hidden)
    assert bits_equal(parts, torch.cat([together[a:b] for a, b in (problem.spans[i] for i in order)]))


def test_policy_and_reference_agree_to_the_bit() -> None:
    """Equal weights, the policy with gradients in one batch, the reference without in another: the margin is 0."""
    problem = make_problem(LENGTHS, V=1000, D=64).to(torch.bfloat16)
    policy = evaluate(logps_of, problem).logps
    with torch.no_grad():
        reference = torch.cat([logps_of(compose(problem, order)) for order in ([0, 1, 2], [3, 4, 5, 6], [7, 8])])
    assert bits_equal(policy, reference)


def test_slices_do_not_depend_on_tokens() -> None:
    """The mechanism behind it: the vocabulary is cut by V, D, dtype and workspace alone."""
    bounds = even_bounds(5003, slice_width(48, 1, torch.bfloat16, torch.device("cpu")))
    assert len(bounds) > 5
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 5003
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    widths = [stop - start for start, stop in bounds]
    assert max(widths) - min(widths) <= 1


def test_control_a_matmul_of_one_row_has_other_bits() -> None:
    """Negative control: what these tests guard against happens on this machine with a plain product."""
    hidden, weight = torch.randn(256, 576), torch.randn(1000, 576)
    together = hidden @ weight.T
    if all(torch.equal(hidden[i : i + 1] @ weight.T, together[i : i + 1]) for i in range(8)):
        pytest.skip("on this machine a single row's product has the same bits")
    problem = Problem(hidden, weight, torch.randint(0, 1000, (256,)), torch.arange(257), shift=False)
    rows = torch.tensor([3])
    one = replace(problem, hidden=hidden[rows], labels=problem.labels[rows], cu_seqlens=cu_seqlens([1]))
    assert bits_equal(fused(one), fused(problem)[rows])
