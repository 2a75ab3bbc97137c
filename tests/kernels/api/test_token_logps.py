"""`fused_token_logps`: per-token values, statistics, and the rows a caller names."""

from dataclasses import replace
from itertools import chain, combinations
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor

from fused_dpo import TokenLogps, fused_dpo_logps, fused_token_logps
from tests.kernels.support.problems import (
    EVERY_FEATURE,
    FLOAT64_GRADIENTS,
    FLOAT64_LOGPS,
    IGNORE,
    Problem,
    assert_close,
    assert_same_bits,
    bits_equal,
    evaluate,
    fused,
    leaves,
    make_problem,
    naive_logits,
    present,
    tokens,
    upstream_like,
)

STATS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
FIELDS = (*STATS, "tail", "kept_fraction")
SUBSETS = list(chain.from_iterable(combinations(FIELDS, k) for k in (0, 1, 2, 6)))


def truth(problem: Problem) -> TokenLogps:
    """All five in float64, by the textbook's formulas, zero where nothing is scored."""
    problem = problem.to(torch.float64)
    logits, target = naive_logits(problem.hidden, problem), problem.aligned
    scored = target != IGNORE
    log_p = logits.log_softmax(-1)
    logps = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return TokenLogps(
        logps.masked_fill(~scored, 0),
        torch.special.entr(log_p.exp()).sum(-1).masked_fill(~scored, 0),
        logits.mean(-1).masked_fill(~scored, 0),
        scored & (logps >= log_p.amax(-1)),
        log_p.exp().square().sum(-1).log().masked_fill(~scored, 0),
    )


@pytest.mark.parametrize("impl", ["streaming", "reference"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_the_truth(dtype: torch.dtype, padded: bool, shift: bool, impl: str) -> None:
    # No adapter in half precision: its inner product is rounded there, and so are the statistics (test_logps has it).
    features = {**EVERY_FEATURE, "lora_rank": 3 if dtype.itemsize > 2 else 0}
    problem = make_problem((5, 63, 1, 200), V=1003, padded=padded, shift=shift, **features).to(dtype)
    problem.labels.view(-1)[1:9] = truth_argmax(problem)[:8] if shift else truth_argmax(problem)[1:9]  # some top-1
    got, expected = tokens(problem, STATS, impl=impl, workspace_mib=1), truth(problem)
    assert present(expected.is_top1).sum() >= 4
    # Half-precision inputs are exact numbers, and all arithmetic on them is fp32: one tolerance for the three, some
    # twenty roundings at the size of the values.
    tolerance = FLOAT64_LOGPS if dtype == torch.float64 else 3e-6
    for name in ("logps", "entropy", "mean_logit", "log_sum_sq_probs"):
        value = present(getattr(got, name))
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.shape == problem.labels.shape
        assert_close(name, value, getattr(expected, name), tolerance)
        assert (value[problem.aligned == IGNORE] == 0).all()
    assert present(got.is_top1).dtype == torch.bool
    assert torch.equal(present(got.is_top1), present(expected.is_top1))


def truth_argmax(problem: Problem) -> Tensor:
    problem = problem.to(torch.float64)
    return naive_logits(problem.hidden, problem).argmax(-1).view(-1)


@pytest.mark.parametrize("with_stats", SUBSETS, ids="+".join)
def test_every_subset_of_statistics(with_stats: tuple[str, ...]) -> None:
    """One named tuple, whatever is asked for; what is not asked for is None, and nothing changes the values."""
    problem = make_problem()
    got, everything = tokens(problem, with_stats), tokens(problem, FIELDS)
    assert isinstance(got, TokenLogps)
    assert got._fields == ("logps", *FIELDS)
    assert bits_equal(got.logps, tokens(problem).logps)
    for name in FIELDS:
        value = getattr(got, name)
        assert (value is not None) == (name in with_stats)
        assert value is None or torch.equal(value, getattr(everything, name))


@pytest.mark.parametrize("collection", [list, set, frozenset, dict.fromkeys])
def test_any_collection_of_names(collection: type) -> None:
    assert tokens(make_problem(), collection(["entropy"])).entropy is not None


def test_return_types_are_declared() -> None:
    assert get_type_hints(fused_token_logps)["return"] is TokenLogps
    assert get_type_hints(fused_dpo_logps)["return"] is Tensor


def test_tokens_add_up_to_sequences() -> None:
    problem = make_problem(**EVERY_FEATURE)
    parts = [tokens(problem).logps[a:b].sum() for a, b in problem.spans]
    assert_close("sums", torch.stack(parts), fused(problem), 1e-14)  # float64, the same terms in another order


@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_statistics_are_not_differentiable(impl: str) -> None:
    problem = make_problem().map(Tensor.requires_grad_)
    got = tokens(problem, STATS, impl=impl)
    assert got.logps.requires_grad
    assert not any(present(getattr(got, name)).requires_grad for name in STATS)
    (with_stats,) = torch.autograd.grad(got.logps.sum(), problem.hidden)
    (without,) = torch.autograd.grad(tokens(problem, impl=impl).logps.sum(), problem.hidden)
    assert bits_equal(with_stats, without)


def test_gradient_of_tokens() -> None:
    problem = make_problem((40, 30), **EVERY_FEATURE)
    upstream = torch.randn(70, dtype=torch.float64)
    fresh = leaves(problem)
    inputs = tuple(fresh.tensors.values())
    got = torch.autograd.grad(tokens(fresh).logps, inputs, upstream)
    expected = torch.autograd.grad(truth_of_leaves(fresh), inputs, upstream)
    for name, ours, true in zip(fresh.tensors, got, expected, strict=True):
        assert_close(f"d{name}", ours, true, FLOAT64_GRADIENTS)


def truth_of_leaves(problem: Problem) -> Tensor:
    log_p = naive_logits(problem.hidden, problem).log_softmax(-1)
    picked = log_p.gather(-1, problem.aligned.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(problem.aligned == IGNORE, 0)


def test_top1_counts_ties() -> None:
    """No token is likelier than the label: true for every label where all logits are the same."""
    problem = Problem(torch.zeros(3, 4), torch.randn(50, 4), torch.tensor([0, 25, 49]), torch.arange(4), shift=False)
    assert present(tokens(problem, ["is_top1"]).is_top1).all()


@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_statistics_with_impossible_tokens(impl: str) -> None:
    """A bias of -inf (vocabulary padding): entropy and squares are over the other tokens, the mean logit is -inf."""
    problem = make_problem(V=2000, bias=True)
    problem = replace(problem, labels=problem.labels.clamp(max=1500))
    present(problem.bias)[[1600, 1999]] = -torch.inf
    got, expected = tokens(problem, STATS, impl=impl, workspace_mib=1), truth(problem)
    assert_close("logps", got.logps, expected.logps, FLOAT64_LOGPS)
    for name in ("entropy", "log_sum_sq_probs"):
        assert_close(name, present(getattr(got, name)), present(getattr(expected, name)), FLOAT64_LOGPS)
    assert torch.equal(present(got.mean_logit), present(expected.mean_logit))
    assert torch.equal(present(got.is_top1), present(expected.is_top1))


def test_statistics_of_extreme_rows() -> None:
    """Uniform: entropy log V. One token far above the rest: entropy 0."""
    hidden = torch.tensor([[0.0], [1.0]])
    weight = torch.zeros(1000, 1)
    weight[3] = 1e4
    got = fused_token_logps(
        hidden, weight, torch.tensor([3, 3]), cu_seqlens=torch.tensor([0, 2]), shift=False, with_stats=STATS
    )
    # 1e-5, 1e-6: fp32 sums of 1000 terms, equal ones and a single one that is not 0. 1e-2 absolute is one rounding of a
    # logit of 1e4, whose difference it is.
    assert abs(float(present(got.entropy)[0]) - float(torch.tensor(1000.0).log())) < 1e-5
    assert abs(float(present(got.entropy)[1])) < 1e-2
    assert_close("mean", present(got.mean_logit), torch.tensor([0.0, 10.0]), 1e-6)


def rows_of(problem: Problem) -> Tensor:
    return (problem.aligned.view(-1) != IGNORE).nonzero().squeeze(1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_row_index_of_all_scored_rows_changes_nothing(impl: str, padded: bool) -> None:
    problem = make_problem((5, 63, 1, 200), padded=padded, **EVERY_FEATURE)
    ways: list[dict[str, Any]] = [{"impl": impl}, {"impl": impl, "row_index": rows_of(problem)}]
    plain, indexed = (tokens(problem, STATS, **way) for way in ways)
    assert all(torch.equal(a, b) for a, b in zip(map(present, plain[:5]), map(present, indexed[:5]), strict=True))
    expected, got = (evaluate(lambda p, way=way: fused(p, **way), problem) for way in ways)
    assert bits_equal(got.logps, expected.logps)
    assert all(bits_equal(grad, expected.grads[name]) for name, grad in got.grads.items())


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_rows_left_out_count_as_not_scored(impl: str, average: bool) -> None:
    """For values, gradients and the divisor of the mean: as if their labels were ignored."""
    problem = make_problem((5, 63, 40), shift=False, average=average)
    keep = rows_of(problem)[::2]
    labels = torch.full_like(problem.labels, IGNORE)
    labels[keep] = problem.labels[keep]
    expected = evaluate(lambda p: fused(p, impl=impl), replace(problem, labels=labels))
    got = evaluate(lambda p: fused(p, impl=impl, row_index=keep), problem)
    assert bits_equal(got.logps, expected.logps)
    assert all(bits_equal(grad, expected.grads[name]) for name, grad in got.grads.items())


@pytest.mark.parametrize("impl", ["streaming", "triton", "library"])
def test_strided_row_index(impl: str) -> None:
    """As a column of a table would be."""
    problem = make_problem((6,), V=7, D=4, shift=False).to(torch.float32)
    problem = replace(problem, labels=problem.labels.clamp(min=0))
    index = torch.stack((torch.arange(4), torch.full((4,), 10**6)), 1)[:, 0]
    assert not index.is_contiguous()
    strided, contiguous = (
        evaluate(lambda p, i=i: fused(p, impl=impl, row_index=i), problem) for i in (index, index.contiguous())
    )
    assert_same_bits(strided, contiguous, "the stride")


def test_empty_row_index() -> None:
    problem = make_problem()
    nothing = torch.empty(0, dtype=torch.int64)
    got = evaluate(lambda p: fused(p, row_index=nothing), problem)
    assert (got.logps == 0).all()
    assert all((present(got.grads[name]) == 0).all() for name in ("hidden", "weight"))
    assert upstream_like(got.logps).ne(0).all()
