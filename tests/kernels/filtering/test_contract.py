"""What filtered gradients promise whatever is dropped: modes, subsets, shapes, and upstream gradients of every kind."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused_dpo.streaming import filtered_backward
from fused_dpo.streaming.kept_products import KeptProducts
from tests.kernels.support.filtered import (
    EPS,
    exact_of,
    filter_of,
    filtered_tokens,
    gradients,
    judgements,
    one_sequence,
    vocabulary_problem,
)
from tests.kernels.support.problems import (
    DIFFERENTIABLE,
    DTYPES,
    EVERY_FEATURE,
    FLOAT64_LOGPS,
    IGNORE,
    SUBSETS,
    Evaluation,
    Problem,
    assert_agrees,
    assert_close,
    assert_same_bits,
    bits_equal,
    cu_seqlens,
    evaluate,
    fused,
    leaves,
    make_problem,
    naive_logps,
    present,
    relative_error,
    tokens,
    truth_of,
    uninitialized_memory_is_nan,
)

pytestmark = pytest.mark.cpu_units


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eps_0_is_exact_to_the_bit(dtype: torch.dtype) -> None:
    problem = make_problem((70, 200), 1000, 48, **EVERY_FEATURE).to(dtype)
    exact = evaluate(exact_of, problem)
    assert_same_bits(evaluate(lambda p: filter_of(p, filter_eps=0.0), problem), exact, "eps 0")
    assert_same_bits(evaluate(lambda p: filter_of(p, filter_eps=0.0, tail_guard=0.0), problem), exact, "both 0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_mode(dtype: torch.dtype) -> None:
    """Filtered in half precision, exact otherwise."""
    problem = replace(make_problem((70, 200), 1000, 48), weight=torch.randn(1000, 48, dtype=torch.float64)).to(dtype)
    expected = evaluate(filter_of if dtype.itemsize == 2 else exact_of, problem)
    assert_same_bits(evaluate(fused, problem), expected, "default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filtering_nothing_agrees_with_the_truth(dtype: torch.dtype) -> None:
    """With an eps that no probability is below the whole machinery runs and drops nothing."""
    problem = make_problem((70, 0, 200), 1000, 48, **EVERY_FEATURE).to(dtype)
    with uninitialized_memory_is_nan():
        assert_agrees(evaluate(lambda p: filter_of(p, filter_eps=1e-300), problem), problem)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mib", [1, 128])
def test_impossible_tokens_cost_nothing(mib: int, dtype: torch.dtype) -> None:
    """A bias of -inf on three columns of four: these are dropped, and there is nothing to be wrong about.

    The gathered products thereby are held to the exact path's tolerance, with all features.
    """
    problem = make_problem((70, 0, 200), 3000, 48, **EVERY_FEATURE)
    possible = torch.arange(3000) % 4 == 1
    present(problem.bias)[~possible] = -torch.inf
    labels = torch.where(problem.labels < 0, IGNORE, problem.labels // 4 * 4 + 1)
    problem = replace(problem, softcap=None, logit_scale=0.3, labels=labels)
    problem = problem.to(dtype)
    with judgements() as seen, uninitialized_memory_is_nan():
        got = evaluate(lambda p: filter_of(p, filter_eps=1e-30, workspace_mib=mib), problem)
    assert torch.equal(seen[0].keep, possible.expand_as(seen[0].keep))
    # The truth's gradient of a bias of -inf is NaN with float64 code, too: the others are what is compared.
    needs = ["hidden", "weight", "lora_a", "lora_b"]
    truth, eager = truth_of(problem, needs), evaluate(naive_logps, problem, needs)
    some_units = FLOAT64_LOGPS if dtype == torch.float64 else 1e-6
    assert_close("logps", got.logps, truth.logps, some_units)
    for name in needs:
        error = relative_error(got.grads[name], truth.grads[name])
        assert error <= max(1e-12, 2 * relative_error(eager.grads[name], truth.grads[name]))
    assert (present(got.grads["bias"])[~possible] == 0).all()


@pytest.fixture(scope="module")
def complete() -> dict[torch.dtype, tuple[Problem, Evaluation]]:
    """All gradients at once, of a head that one slice of the workspace holds."""
    problem = replace(make_problem((7, 200), 1000, 33, **EVERY_FEATURE), softcap=30.0)
    made = {dtype: problem.map(lambda t: 2 * t).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return {dtype: (problem, evaluate(filter_of, problem)) for dtype, problem in made.items()}


@pytest.mark.parametrize("needs", SUBSETS[:-1], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_subset_of_gradients_has_the_same_bits(
    needs: tuple[str, ...], dtype: torch.dtype, complete: dict[torch.dtype, tuple[Problem, Evaluation]]
) -> None:
    problem, expected = complete[dtype]
    got = evaluate(filter_of, problem, needs)
    assert bits_equal(got.logps, expected.logps)
    assert {name for name, grad in got.grads.items() if grad is not None} == set(needs)
    for name in needs:
        if name.startswith("lora"):  # BLAS sums the adapter's columns otherwise when they stand alone: units of fp32
            assert relative_error(got.grads[name], present(expected.grads[name]).double()) <= 2e-6
        else:
            assert bits_equal(got.grads[name], expected.grads[name])


@pytest.mark.parametrize(
    "needs",
    [("hidden",), ("weight",), ("hidden", "weight"), ("bias",)],
    ids="+".join,
)
def test_subsets_have_the_same_bits_in_many_slices(needs: tuple[str, ...]) -> None:
    problem = make_problem((40, 70), 6001, 64, bias=True).to(torch.float32)
    problem = replace(problem, weight=3 * problem.weight)
    expected, got = (evaluate(lambda p: filter_of(p, workspace_mib=1), problem, n) for n in (DIFFERENTIABLE, needs))
    assert all(relative_error(got.grads[name], present(expected.grads[name]).double()) < 1e-6 for name in needs)
    assert all(bits_equal(got.grads[name], expected.grads[name]) for name in needs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [1, 2, 3, 63, 127, 129, 1001])
def test_odd_vocabularies(V: int, dtype: torch.dtype) -> None:
    """Any V, one row, empty sequences: within the theorem's 2.2 % and the dtype's own error of the gradients."""
    problem = make_problem((1, 0, 130, 2, 1), V, 17, shift=False).to(dtype)
    problem = replace(problem, weight=4 * problem.weight)
    got, truth, eager = evaluate(filter_of, problem), truth_of(problem), evaluate(naive_logps, problem)
    assert got.logps[1] == 0
    rounding = 1e-12 if dtype == torch.float64 else 1e-5  # sums of up to 1001 terms
    # Log-probs of a coarse screen: the tail, of an eps at most a column, is known up to its bf16 logits.
    assert (got.logps.double() - truth.logps).abs().max() <= 100 * rounding + 131 * V * EPS * 0.01
    for name, grad in truth.grads.items():
        if grad is not None and grad.norm() > 1e-10:  # with one column there is nothing but rounding
            bound = rounding + math.sqrt(2 * EPS) + relative_error(eager.grads[name], grad)
            assert relative_error(got.grads[name], grad) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (1,), (5, 3)])
def test_nothing_scored(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = make_problem((max(sum(lengths), 1),), 1000, 16, **EVERY_FEATURE).to(dtype)
    T = sum(lengths)
    problem = replace(
        problem,
        hidden=problem.hidden[:T],
        labels=torch.full((T,), IGNORE),
        cu_seqlens=cu_seqlens(lengths),
    )
    got = evaluate(filter_of, problem)
    assert got.logps.tolist() == [0.0] * len(lengths)
    assert all((present(grad) == 0).all() for grad in got.grads.values())
    stats = filtered_tokens(problem, ["tail", "kept_fraction"])
    assert (present(stats.tail) == 0).all()
    assert (present(stats.kept_fraction) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_invalid_label_poisons_where_values_cannot_be_seen(dtype: torch.dtype) -> None:
    """Compiled code does not look at labels: NaN for the sequence, and no index out of bounds in either pass."""
    problem = make_problem((40, 50, 6), 500, 16).to(dtype)
    problem = replace(problem, weight=(3 * problem.weight).requires_grad_())
    problem.labels[60] = 500
    compiled = torch.compile(filter_of, fullgraph=True, backend="aot_eager")
    logps = compiled(problem)
    assert logps.isnan().tolist() == [False, True, False]
    logps[[0, 2]].sum().backward()  # no gradient for the sequence that is NaN: none of it in the others'
    with pytest.raises(ValueError, match="labels must lie in"):
        filter_of(problem)
    others = evaluate(exact_of, replace(problem, labels=problem.labels.clone().index_fill(0, torch.tensor([60]), 0)))
    assert bits_equal(logps[[0, 2]].detach(), filter_of(valid(problem)).detach()[[0, 2]])
    assert others.logps.isfinite().all()
    assert present(problem.weight.grad).isfinite().all()


def valid(problem: Problem) -> Problem:
    return replace(problem, labels=problem.labels.clamp(max=problem.weight.shape[0] - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ["all", "one sequence", "some"])
def test_zero_upstream_is_exactly_zero(rows: str, dtype: torch.dtype) -> None:
    """Also for single sequences or rows: nothing of a neighbour's correction may get there."""
    problem = make_problem((100, 30, 200), 1000, 16, shift=False).to(dtype)
    problem = replace(problem, weight=3 * problem.weight)
    upstream = torch.randn(330)
    without = {"all": slice(None), "one sequence": slice(100, 130), "some": slice(0, 330, 3)}[rows]
    upstream[without] = 0.0
    dhidden, dweight = gradients(problem, upstream)
    assert (dhidden[without] == 0).all()
    assert bool((dweight == 0).all()) == (rows == "all")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_upstream_that_is_not_finite_comes_out(bad: float, dtype: torch.dtype) -> None:
    """As in the exact path: NaN or infinity in the row's dH and in dW, and other sequences as they would be exactly."""
    problem = make_problem((100, 30, 200), 1000, 16, shift=False).to(dtype)
    problem = replace(problem, weight=3 * problem.weight)
    problem.labels[110] = 5
    upstream = torch.ones(330)
    upstream[110] = bad
    dhidden, dweight = gradients(problem, upstream)
    exact_dhidden, exact_dweight = gradients(problem, upstream, "exact")
    assert not dhidden[110].isfinite().any()
    assert not dweight.isfinite().any()
    assert not exact_dweight.isfinite().any()
    others = [*range(100), *range(130, 330)]
    assert dhidden[others].isfinite().all()
    assert_close("dhidden", dhidden[others], exact_dhidden[others], 2 * torch.finfo(dtype).eps)  # rounded twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_that_is_not_finite_stays_in_its_row(dtype: torch.dtype) -> None:
    problem = make_problem((30,), 300, 16, shift=False).to(dtype)
    upstream = (problem.labels >= 0).float()
    row = int(upstream.nonzero()[3])
    upstream[row] = torch.nan
    exact, got = (gradients(problem, upstream, mode)[0].isfinite().all(1) for mode in ("exact", "filtered"))
    assert exact.logical_not().nonzero().tolist() == [[row]]
    assert torch.equal(got, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("without", [slice(30, 70), slice(35, 36)], ids=["sequence", "row"])
@pytest.mark.parametrize("features", [{}, {"bias": True, "lora_rank": 3, "softcap": 50.0}], ids=["plain", "everything"])
def test_what_is_broken_without_gradient_is_harmless(features: dict, without: slice, dtype: torch.dtype) -> None:
    """NaN hidden states in a sequence, or in a row, that the loss leaves out: as if they were others."""
    problem = make_problem((30, 40), 300, 16, shift=False, **features)
    problem = replace(problem.to(dtype), weight=(5 * problem.weight).to(dtype))
    problem.labels[35] = 7
    broken = replace(problem, hidden=problem.hidden.index_fill(0, torch.tensor([35]), torch.nan))
    upstream = torch.ones(70)
    upstream[without] = 0.0
    for mode in ("exact", "filtered"):
        fresh = leaves(broken), leaves(problem)
        for p in fresh:
            tokens(p, [], "streaming", grad_mode=mode).logps.backward(upstream)
        for (name, got), whole in zip(fresh[0].tensors.items(), fresh[1].tensors.values(), strict=True):
            # A block's threshold is another one with another row in it, within the budget of both.
            limit = torch.finfo(dtype).eps if mode == "exact" else 2 * (2 * 2**-12) ** 0.5
            assert relative_error(got.grad, present(whole.grad).double()) <= limit, f"{mode}, {name}"


def test_saturated_pairs_cost_next_to_nothing() -> None:
    """Half of the sequences with a hundredth of the gradient, then less: few of their columns are multiplied.

    And the gradients are as close as those of the others alone: the budget is that of the batch.
    """
    problem = vocabulary_problem((128, 128, 128, 128), 64, 20000)
    multiplied: list[int] = []
    columns = KeptProducts.columns

    def spy(self: KeptProducts, keep: Tensor, first: int) -> Iterator[slice | Tensor]:
        multiplied.append(int(keep.sum()))
        return columns(self, keep, first)

    def run(upstream: Sequence[float]) -> tuple[list[int], list[Tensor], list[Tensor]]:
        weights = torch.tensor(upstream).repeat_interleave(128)
        fresh = leaves(problem)
        logps = filtered_tokens(fresh).logps
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KeptProducts, "columns", spy)
            multiplied.clear()
            got = torch.autograd.grad(logps, (fresh.hidden, fresh.weight), weights)
        return list(multiplied), list(got), gradients(problem, weights, "exact")

    everyone, _, _ = run([1.0, -1.0, 1.0, -1.0])
    half, got, exact = run([1.0, -1e-2, 1.0, -1e-2])
    assert 500 < min(everyone) < max(everyone) < 10000
    assert half[1] < everyone[1] / 3
    assert half[3] < everyone[3] / 3
    # S falls to 0.7 of what it was, so the others keep what they had.
    assert half[0] == everyone[0]
    assert half[2] == everyone[2]
    for value, truth in zip(got, exact, strict=True):
        # The theorem's 2.2 % hold for dz; on independent rows its products are not far from that.
        assert relative_error(value, truth.double()) <= math.sqrt(2 * EPS)
    none, _, _ = run([1.0, -1e-5, 1.0, -1e-5])
    assert none[1] == none[3] == 0


def test_what_is_flat_throughout_is_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact backward takes over where every block keeps everything, and only there; buffers are its own alone."""
    flat = one_sequence(torch.randn(200, 16), 0.02 * torch.randn(3000, 16), torch.randint(3000, (200,)))
    peaked = replace(flat, weight=100 * flat.weight)
    upstream = torch.rand(200)
    expected = gradients(flat, upstream, "exact")
    fresh = {name: leaves(problem) for name, problem in (("flat", flat), ("peaked", peaked))}
    logps = {name: filtered_tokens(problem).logps for name, problem in fresh.items()}

    def gathers(*_: object) -> None:
        raise AssertionError("columns are gathered")

    monkeypatch.setattr(filtered_backward, "KeptProducts", gathers)
    grads = torch.autograd.grad(logps["flat"], list(fresh["flat"].tensors.values()), upstream)
    for got, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, exact)
    with pytest.raises(AssertionError, match="columns are gathered"):
        logps["peaked"].backward(upstream)
