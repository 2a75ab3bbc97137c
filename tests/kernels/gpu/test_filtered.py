"""Filtered gradients by the Triton kernels: on a GPU where there is one, else in Triton's interpreter.

Problems are peaked, so that most columns are dropped, and compared with the exact gradients of the same kernels: what
differs is the filter alone. Its error budget is tested in test_filtered_theorem.py for all inputs; here the kernels are
held to a stricter figure on one kind of them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from fused_dpo import KernelOptions, LMHead, fused_dpo_logps
from fused_dpo.filtering import BIAS, EVERYTHING, Filtering
from fused_dpo.gpu.configs import HOT_SPLITS, NARROW_COLUMNS, SPLIT_COLUMNS, library_config
from fused_dpo.gpu.filtered.blocks import screening_config, triton_screen_shape
from fused_dpo.gpu.filtered.forward import triton_filtered_forward
from fused_dpo.gpu.filtered.lists import KeptLists
from fused_dpo.gpu.forward import fused_scan
from fused_dpo.gpu.launch import architecture
from fused_dpo.gpu.library import library_scan
from fused_dpo.head import HeadInputs
from fused_dpo.ops.dispatch import run_exact_forward
from tests.kernels.support.gpu import DEVICE, TILE, TRITON_DTYPES, on_device
from tests.kernels.support.problems import (
    DIFFERENTIABLE,
    IGNORE,
    Evaluation,
    Problem,
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
    upstream_like,
)

EVERYTHING_AT_ONCE = {"bias": True, "lora_rank": 3, "logit_scale": 1.2, "softcap": 60.0, "temperature": 0.9}
BLOCK = TILE.block_t
ERROR = 2e-3
"""Of gradients on peaked problems, a tenth of what the theorem allows for all (2.2 % of dz at 2^-12)."""


ROUNDING = 1e-5
"""Of fp32 gradients where every column is kept: the same sums in another order."""


def peaked(lengths: Sequence[int] = (5, 24, 1), V: int = 400, D: int = 16, **settings: Any) -> Problem:
    """Logits of standard deviation 15: a row gives a handful of columns more than 2^-12."""
    problem = make_problem(lengths, V=V, D=D, **settings)
    return on_device(replace(problem, weight=problem.weight * 5))


def by_triton(grad_mode: str, **options: Any) -> Any:
    return lambda problem: fused(problem, impl="triton", grad_mode=grad_mode, **options)


def kept_fraction(problem: Problem, **options: Any) -> float:
    got = tokens(problem, ["kept_fraction"], impl="triton", grad_mode="filtered", **options)
    return float(present(got.kept_fraction).max())


def assert_near_exact(got: Evaluation, exact: Evaluation, error: float = ERROR) -> None:
    torch.testing.assert_close(got.logps, exact.logps, rtol=1e-6, atol=1e-5)  # tiles differ, and so does their order
    for name, grad in got.grads.items():
        assert (grad is None) == (exact.grads[name] is None)
        if grad is not None:
            assert relative_error(grad, exact.grads[name]) <= error, name


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": True}, {"softcap": 60.0}, {"temperature": 0.8}, {"lora_rank": 1}, {"lora_rank": 17},
     EVERYTHING_AT_ONCE, {"padded": True, **EVERYTHING_AT_ONCE}],
    ids=lambda settings: "+".join(settings) or "plain",
)  # fmt: skip
def test_options(settings: dict[str, Any], dtype: torch.dtype) -> None:
    problem = peaked(**settings).to(dtype)
    assert kept_fraction(problem) < 0.5, "the filter has to have something to drop"
    exact = evaluate(by_triton("exact"), problem)
    # fp16: dz is rounded to 2^-11, and the columns that are left out round differently
    assert_near_exact(evaluate(by_triton("filtered"), problem), exact, ERROR if dtype == torch.float32 else 2 * ERROR)


def test_it_is_the_filter_that_differs() -> None:
    """Control: the figures above are not those of rounding, and grow with eps as they should."""
    problem = peaked().to(torch.float32)
    exact = evaluate(by_triton("exact"), problem)
    errors = [
        relative_error(evaluate(by_triton("filtered", filter_eps=eps), problem).grads["hidden"], exact.grads["hidden"])
        for eps in (2**-6, 2**-12, 2**-20)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0
    assert_same_bits(evaluate(by_triton("filtered", filter_eps=0.0), problem), exact, "eps = 0")


@pytest.mark.parametrize("V", [2, 31, 65])
def test_small_vocabularies_keep_everything(V: int) -> None:
    problem = on_device(make_problem((5, 1, 19), V=V, D=9).to(torch.float32))
    assert_near_exact(evaluate(by_triton("filtered"), problem), evaluate(by_triton("exact"), problem), ROUNDING)


def test_a_vocabulary_of_one() -> None:
    """Its token is certain: every number is exactly 0."""
    got = evaluate(by_triton("filtered"), peaked(V=1).to(torch.float32))
    assert (got.logps == 0).all()
    assert all((grad == 0).all() for grad in got.grads.values() if grad is not None)


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",), ("lora_a",), ("lora_b",), ("weight", "lora_a")])
def test_subsets_of_gradients(needs: tuple[str, ...]) -> None:
    """Frozen head, frozen hidden states and what lies between: the bits of the full run."""
    problem = peaked((7, 20), **EVERYTHING_AT_ONCE).to(torch.float32)
    everything = evaluate(by_triton("filtered"), problem)
    part = evaluate(by_triton("filtered"), problem, needs)
    for name in DIFFERENTIABLE:
        assert bits_equal(part.grads[name], everything.grads[name] if name in needs else None), name


def test_rows_of_dz_sum_to_zero() -> None:
    """With the identity as the head, the gradient of the hidden states is that of the logits."""
    V = 600
    rng = torch.Generator().manual_seed(0)
    logits = 12 * torch.randn(40, V, generator=rng)
    hidden = logits.to(DEVICE).requires_grad_()
    labels, offsets = torch.randint(V, (40,), generator=rng).to(DEVICE), cu_seqlens((30, 10)).to(DEVICE)
    options = KernelOptions(impl="triton", filter_eps=2**-6, tail_guard=1.0)
    logps = fused_dpo_logps(
        hidden, torch.eye(V, device=DEVICE), labels, cu_seqlens=offsets, shift=False, grad_mode="filtered",
        options=options,
    )  # fmt: skip
    (dz,) = torch.autograd.grad(logps, hidden, torch.tensor([1.0, -0.5], device=DEVICE))
    true = torch.nn.functional.one_hot(labels, V) - logits.to(DEVICE).softmax(-1)
    true[30:] *= -0.5
    assert (dz - true).abs().max() > 1e-4, "something is dropped"
    assert dz.sum(1).abs().max() < 1e-6  # 600 terms of at most 1 in fp32
    assert (dz - true).norm() < (2 * 2**-6) ** 0.5 * true.norm()


def alike(*, beside: bool) -> Problem:
    """Rows sure of one of three tokens, with one tail in common; some of it beside those three, or only far away."""
    R, V, D = 20, 320, 16
    problem = make_problem((R,), V=V, D=D, bias=True, lora_rank=2, shift=False)
    hidden, weight, bias = 0.05 * torch.randn(R, D), torch.randn(V, D) / 2, torch.randn(V) / 4
    hidden[:, :4], weight[:, :4], weight[:3, 1:4], bias[:3] = 0, 0, 14 * torch.eye(3), 0
    hidden[:, 0], hidden[torch.arange(R), 1 + torch.arange(R) % 3] = 1, 1
    if not beside:
        weight[3:NARROW_COLUMNS, 0] = -40
    a, b = 0.1 * torch.randn(2, D), torch.randn(V, 2)
    b[:3] = 0
    problem = replace(problem, hidden=hidden, weight=weight, bias=bias, lora_a=a, lora_b=b, lora_scale=0.5)
    return on_device(replace(problem, labels=torch.arange(R) % 3))


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_correction_of_the_gradients_of_the_head(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight, bias and the adapter's B: far closer than without, which leaves out all that the rows have in common."""
    problem = alike(beside=False).to(dtype)
    options = {"filter_eps": 2**-6}
    assert kept_fraction(problem, **options) < 0.02
    exact = evaluate(by_triton("exact"), problem).grads
    got = evaluate(by_triton("filtered", **options), problem).grads
    block_sums = KeptLists._block_sums
    monkeypatch.setattr(KeptLists, "_block_sums", lambda *arguments: block_sums(*arguments).zero_())
    without = evaluate(by_triton("filtered", **options), problem).grads
    for name in ("weight", "bias", "lora_b"):
        assert relative_error(without[name], exact[name]) > 0.01, name
        assert relative_error(got[name], exact[name]) < relative_error(without[name], exact[name]) / 2, name
    assert bits_equal(got["hidden"], without["hidden"])
    assert bits_equal(got["lora_a"], without["lora_a"])


def test_correction_goes_through_the_softcap() -> None:
    """The identity as the head, logits of -29 below one of -16: there the derivative of the softcap is a half."""
    R, V = BLOCK, 300
    rng = torch.Generator().manual_seed(0)
    hidden = -4.7 + torch.randn(1, V, generator=rng) / 8 + 0.005 * torch.randn(R, V, generator=rng)
    labels, far = torch.arange(R) % 3, slice(NARROW_COLUMNS, V)
    hidden[torch.arange(R), labels] = -2.1
    head: Any = {"logit_scale": 4.0, "softcap": 20.0, "temperature": 0.5}
    problem = on_device(Problem(hidden, torch.eye(V), labels, cu_seqlens((R,)), shift=False, **head))
    exact = evaluate(by_triton("exact"), problem).grads
    got = evaluate(by_triton("filtered", filter_eps=2**-6), problem).grads
    assert relative_error(present(got["hidden"])[:, far], present(exact["hidden"])[:, far].double()) < 0.4
    assert relative_error(present(got["weight"])[far], present(exact["weight"])[far].double()) < 0.4
    assert not torch.allclose(present(got["weight"])[far], present(exact["weight"])[far], rtol=0.01), "it is a mean"


def test_what_is_dropped_is_corrected_once() -> None:
    """Every row has its target among the first columns, so dz is computed there, also of what the blocks drop."""
    problem = alike(beside=True).to(torch.float32)
    exact = present(evaluate(by_triton("exact"), problem, ["weight"]).grads["weight"])
    got = present(evaluate(by_triton("filtered", filter_eps=2**-6), problem, ["weight"]).grads["weight"])
    beyond = slice(3, TILE.narrow)  # the targets are the first three
    # Rounded to powers of two a mean is off by 0.44 at most; computed and corrected, it would count twice.
    assert relative_error(got[beyond], exact[beyond].double()) <= 0.44


@pytest.mark.parametrize("want_stats", [False, True])
@pytest.mark.parametrize("by", ["triton", "library"])
def test_screen_bounds_the_probabilities(by: str, want_stats: bool) -> None:
    """Several splits, first and later ones: every exponent is that of its block's largest probability or above."""
    config = library_config(architecture(torch.device(DEVICE)), torch.float32)
    hot = HOT_SPLITS * SPLIT_COLUMNS if by == "triton" else config.slice_columns
    eps = 2**-12 if hot > 1000 else 2**-5
    V = hot + (SPLIT_COLUMNS + 100 if by == "triton" else hot // 2 - 4)
    problem = on_device(make_problem((37,), V=V, D=4, shift=False).to(torch.float32))
    problem = replace(problem, weight=problem.weight * 2)
    target = problem.labels.masked_fill(problem.labels == IGNORE, -1)
    rows = (target >= 0).nonzero().squeeze(1)
    head = LMHead(problem.weight)
    shape = triton_screen_shape(problem.hidden, head, len(rows))
    inputs = HeadInputs(problem.hidden, target, rows, head, 64)
    scan = library_scan
    if by == "triton":
        scan = partial(fused_scan, config=screening_config(problem.hidden, head, want_stats=want_stats))
    settings: Any = {"screen_shape": shape, "want_stats": want_stats}
    logps, state, stats, screen = triton_filtered_forward(inputs, Filtering(eps, 1.0), scan, **settings)
    p = (problem.hidden[rows].double() @ problem.weight.double().T).softmax(-1)
    blocks = p.split(BLOCK)
    largest, mean = torch.stack([part.amax(0) for part in blocks]), torch.stack([part.mean(0) for part in blocks])
    assert screen.shape == shape == (len(largest), 2, V)
    kept = largest > eps
    slack, slack_of_mean = (screen.int() - torch.frexp(torch.stack((largest, mean), 1)).exponent - BIAS + 1).unbind(1)
    assert int(slack[kept].min()) >= 0
    # What the first splits sum to bounds the means of later ones from above; their own are as far off as their sums.
    known = mean > 2**-100
    assert int(slack_of_mean[known].min()) >= 0
    assert float((slack_of_mean[:, hot:] <= 1).double().mean()) > 0.9
    later = slack[:, hot:][kept[:, hot:]]
    assert float((later <= 1).double().mean()) > 0.9, "what two thirds of the vocabulary sum to is close to all of it"
    assert (stats is not None) == want_stats
    own_tail = torch.where(p <= eps, p, 0.0).sum(1)
    dropped = (screen[:, 0].int() < BIAS + math.log2(eps)).repeat_interleave(BLOCK, 0)[: len(rows)]
    # 1e-5: fp32 sums of V probabilities.
    assert (state.tail[rows] <= own_tail + 1e-5).all()  # what the bound lifts over eps is not in the tail
    assert (state.tail[rows] >= torch.where(dropped, p, 0.0).sum(1) - 1e-5).all()  # but all that is dropped is
    torch.testing.assert_close(
        state.one_minus_p[rows], 1 - logps[rows].exp(), rtol=2.5e-7, atol=0
    )  # of improbable targets

    flat = triton_filtered_forward(inputs, Filtering(eps, 0.0), scan, **settings)
    assert (flat[3][:, 0] == EVERYTHING).all()
    assert torch.equal(flat[3][:, 1], screen[:, 1])
    assert bits_equal(flat[0], logps)
    assert (flat[1].kept_fraction[rows] == 1).all()


@pytest.mark.parametrize("impl", ["triton", "library"])
def test_one_minus_p_keeps_its_digits(impl: str) -> None:
    """1 - p of targets from p = 1/8 to 1 - 1e-7, against float64: of what is small no digit is lost."""
    hidden = torch.linspace(0.0, 18.0, 60, device=DEVICE)[:, None]
    weight = torch.full((8, 1), -1.0, device=DEVICE)
    weight[3] = 0.0  # log p = -log(1 + 7 exp(-h))
    target, rows = torch.full((60,), 3, device=DEVICE), torch.arange(60, device=DEVICE)
    inputs = HeadInputs(hidden, target, rows, LMHead(weight), 64)
    logps, state, _ = run_exact_forward(impl, inputs, want_stats=False)
    assert -logps.max() < 2e-7 < 2 < -logps.min()
    expected = -torch.expm1(logps.double())
    # Six fp32 operations of the series; where exp(logp) is taken from 1, its last bit beside 1 - exp(-0.1).
    torch.testing.assert_close(state.one_minus_p.double(), expected, rtol=2e-6, atol=0)
    plain = (1 - logps.exp()).double()
    assert ((plain - expected).abs() / expected).max() > 1e-4, "without the series digits are lost"


def test_flat_distributions_are_exact() -> None:
    problem = peaked((20, 5), V=1000, D=8).to(torch.float32)
    flat = replace(problem, weight=problem.weight * 0.01)
    exact = evaluate(by_triton("exact"), flat)
    eps = 2**-8  # of which a flat distribution over 1000 tokens has a quarter everywhere
    assert kept_fraction(flat, filter_eps=eps) == 1.0
    assert_near_exact(evaluate(by_triton("filtered", filter_eps=eps), flat), exact, ROUNDING)
    unguarded = evaluate(by_triton("filtered", filter_eps=eps, tail_guard=1.0), flat)
    assert relative_error(unguarded.grads["weight"], exact.grads["weight"]) > 1e-3, "it is the guard that does it"


def test_rounds_and_slices_of_a_small_workspace() -> None:
    """Lists longer than the workspace is wide, among them those of blocks that keep everything."""
    V = 3000
    problem = peaked((170, 3), V=V, D=4).to(torch.float32)
    rows = int((problem.aligned != IGNORE).sum())
    assert rows * V * 4 > 2**20, "the workspace has to be too small"
    exact = evaluate(by_triton("exact"), problem)
    small = evaluate(by_triton("filtered", workspace_mib=1), problem)
    assert_near_exact(small, exact)
    everything = evaluate(by_triton("filtered", workspace_mib=1, tail_guard=0.0), problem)
    assert_near_exact(everything, exact, ROUNDING)


def test_upstream_gradients_decide_what_is_kept() -> None:
    """Sequences of gradient 0 cost and give nothing; tiny ones are within the budget of the large ones."""
    problem = peaked((30, 3 * BLOCK + 30, 20)).to(torch.float32)
    for middle in (0.0, 1e-6):
        upstream = torch.tensor([1.0, middle, -2.0], device=DEVICE)
        grads = {}
        for mode in ("exact", "filtered"):
            fresh = leaves(problem)
            logps = fused(fresh, impl="triton", grad_mode=mode)
            grads[mode] = torch.autograd.grad(logps, (fresh.hidden, fresh.weight), upstream)
        for got, exact in zip(grads["filtered"], grads["exact"], strict=True):
            assert relative_error(got, exact) <= ERROR
        rows = grads["filtered"][0][30 : 60 + 3 * BLOCK]
        # Blocks that hold rows of both sequences are kept by their neighbours: a gradient of the upstream's size, 1e-6.
        assert rows.abs().max() <= 1e-5 * grads["filtered"][0].abs().max()
        inner = slice(2 * BLOCK, BLOCK + 30)  # in blocks of their own, a third of the rows is not scored
        assert (rows[inner] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_comes_out(value: float) -> None:
    problem = peaked((5, 6)).to(torch.float32)
    fresh = leaves(problem)
    logps = fused(fresh, impl="triton", grad_mode="filtered")
    upstream = torch.tensor([value, 1.0], device=DEVICE)
    dhidden, dweight = torch.autograd.grad(logps, (fresh.hidden, fresh.weight), upstream)
    assert not dweight.isfinite().all()
    assert not dhidden[:5].isfinite().all()


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_same_bits_again_and_from_poisoned_memory(dtype: torch.dtype) -> None:
    problem = peaked(**EVERYTHING_AT_ONCE).to(dtype)
    first = evaluate(by_triton("filtered"), problem)
    assert_same_bits(evaluate(by_triton("filtered"), problem), first, "the second run")
    with uninitialized_memory_is_nan():
        assert_same_bits(evaluate(by_triton("filtered"), problem), first, "poisoned buffers")
    with torch.no_grad():
        assert bits_equal(by_triton("filtered")(problem), first.logps), "without gradient"


def test_unscored_rows_and_strides() -> None:
    problem = peaked((5, 23)).to(torch.float32)
    expected = evaluate(by_triton("filtered"), problem)
    unscored = (problem.aligned == IGNORE)[:, None]
    poisoned = replace(problem, hidden=problem.hidden.masked_fill(unscored, torch.nan))
    assert_same_bits(evaluate(by_triton("filtered"), poisoned), expected, "NaN in unscored rows")
    wide = torch.stack((problem.hidden, torch.full_like(problem.hidden, torch.nan)), dim=1)
    hidden, weight = wide[:, 0].requires_grad_(), problem.weight.T.contiguous().T.requires_grad_()
    logps = by_triton("filtered")(replace(problem, hidden=hidden, weight=weight))
    grads = torch.autograd.grad((logps * upstream_like(logps)).sum(), (hidden, weight))
    assert bits_equal(logps.detach(), expected.logps)
    assert bits_equal(grads[0], expected.grads["hidden"])
    assert bits_equal(grads[1], expected.grads["weight"])


@pytest.mark.parametrize("lengths", [(0,), (1,), (BLOCK,), (BLOCK + 1, 0, 2 * BLOCK)], ids=str)
def test_row_counts(lengths: tuple[int, ...]) -> None:
    problem = peaked(lengths, shift=False).to(torch.float32)
    got, exact = evaluate(by_triton("filtered"), problem), evaluate(by_triton("exact"), problem)
    assert_near_exact(got, exact, 2 * ERROR) if sum(lengths) else assert_same_bits(got, exact, "nothing scored")
