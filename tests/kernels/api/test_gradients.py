"""Gradients: every subset of inputs, every kind of upstream gradient, and what autograd may be asked to do."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_dpo import KernelOptions, fused_dpo_logps
from tests.kernels.support.problems import (
    DIFFERENTIABLE,
    EVERY_FEATURE,
    FLOAT64_GRADIENTS,
    IGNORE,
    SUBSETS,
    Evaluation,
    Problem,
    assert_agrees,
    assert_close,
    assert_same_bits,
    bits_equal,
    compose,
    evaluate,
    fused,
    make_problem,
    naive_logps,
    present,
    relative_error,
    tokens,
)

EVERYTHING = {**EVERY_FEATURE, "softcap": 4.0}


def grad_of(output: Tensor, *inputs: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, upstream if upstream is not None else torch.ones_like(output))


@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_every_subset(needs: tuple[str, ...], dtype: torch.dtype) -> None:
    """Frozen head, frozen hidden states and everything between; what is not asked for is None."""
    problem = make_problem((7, 70), V=67, D=9, **EVERYTHING).to(dtype)
    assert_agrees(evaluate(fused, problem, needs), problem, needs)


def test_nothing_required() -> None:
    assert not fused(make_problem()).requires_grad
    with torch.no_grad():
        assert not fused(make_problem().map(Tensor.requires_grad_)).requires_grad
    with torch.inference_mode():
        assert fused(make_problem()).isfinite().all()


UPSTREAMS = {
    "uniform": lambda n: torch.ones(n),
    "non-uniform": lambda n: torch.linspace(0.1, 3.0, n),
    "negative": lambda n: -torch.linspace(0.1, 3.0, n),
    "some zero": lambda n: torch.arange(n).remainder(2).float(),
    "all zero": lambda n: torch.zeros(n),
    "stride 0": lambda n: torch.tensor(0.7).expand(n),
    "strided": lambda n: torch.linspace(-1, 1, 3 * n)[::3],
    "tiny": lambda n: torch.linspace(1e-30, 1e-29, n),
    "huge": lambda n: torch.linspace(1e20, 1e21, n),
}


@pytest.mark.parametrize("of", ["sequences", "tokens"])
@pytest.mark.parametrize("upstream_of", UPSTREAMS.values(), ids=UPSTREAMS.keys())
def test_upstream(upstream_of: Callable[[int], Tensor], of: str) -> None:
    """Per-token calls hand the upstream gradient to the op as it is, strides and all."""
    problem = make_problem((5, 70, 20), **EVERYTHING).map(lambda t: t.requires_grad_())
    inputs = tuple(problem.tensors.values())
    if of == "sequences":
        got, expected = fused(problem), naive_logps(problem)
    else:
        scored = problem.aligned != IGNORE
        got, expected = tokens(problem).logps, naive_logps(as_single_tokens(problem)) * scored
    upstream = upstream_of(len(got)).double()
    grads, expected_grads = (grad_of(output, *inputs, upstream=upstream) for output in (got, expected))
    for name, ours, true in zip(problem.tensors, grads, expected_grads, strict=True):
        assert_close(f"d{name}", ours, true, FLOAT64_GRADIENTS)


def as_single_tokens(problem: Problem) -> Problem:
    """Every row a sequence of its own."""
    rows = problem.labels.numel()
    return replace(problem, labels=problem.aligned, cu_seqlens=torch.arange(rows + 1), shift=False)


def test_sum_backward() -> None:
    """`sum().backward()` hands over one element with stride 0, a mean a scaled one; both meet a non-uniform control."""
    problem = make_problem((5, 70, 20))
    hidden = problem.hidden.requires_grad_()
    (summed,) = grad_of(fused(problem).sum(), hidden)
    (mean,) = grad_of(fused(problem).mean(), hidden)
    (weighted,) = grad_of((fused(problem) * torch.tensor([1.0, 2.0, 3.0])).sum(), hidden)
    (expected,) = grad_of(naive_logps(problem).sum(), hidden)
    assert_close("sum", summed, expected, FLOAT64_GRADIENTS)
    assert_close("mean", mean, expected / 3, FLOAT64_GRADIENTS)
    assert (weighted - summed).abs().max() > 0.1


def test_gradients_scale_with_upstream_exactly() -> None:
    """A power of two commutes with every rounding, so nothing in the backward may depend on the upstream's size."""
    problem = make_problem((5, 70, 20), bias=True).to(torch.float32)
    inputs = tuple(t.requires_grad_() for t in problem.tensors.values())
    once, scaled = (grad_of(fused(problem).sum() * factor, *inputs) for factor in (1.0, 2.0**-20))
    assert all(torch.equal(a * 2.0**-20, b) for a, b in zip(once, scaled, strict=True))


@pytest.mark.parametrize("needs", [DIFFERENTIABLE, ("hidden",), ("weight",), ("lora_a",)], ids="+".join)
def test_gradcheck_streaming(needs: tuple[str, ...]) -> None:
    problem = make_problem((4, 3), V=11, D=3, **{**EVERYTHING, "lora_rank": 2})
    assert torch.autograd.gradcheck(*function_of(problem, needs, fused))


def test_gradgradcheck_reference() -> None:
    problem = make_problem((3, 2), V=5, D=2, **{**EVERYTHING, "lora_rank": 1})
    function, inputs = function_of(problem, DIFFERENTIABLE, lambda p: fused(p, impl="reference"))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def function_of(
    problem: Problem, needs: tuple[str, ...], function: Callable[[Problem], Tensor]
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """`function` of the tensors named, as `gradcheck` takes it."""
    inputs = tuple(problem.tensors[name].detach().clone().requires_grad_() for name in needs)
    return lambda *tensors: function(replace(problem, **dict(zip(needs, tensors, strict=True)))), inputs


def test_double_backward_is_refused() -> None:
    problem = make_problem()
    hidden = problem.hidden.requires_grad_()
    (grad,) = torch.autograd.grad(fused(problem).sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"impl='reference'"):
        grad.square().sum().backward()


def test_retain_graph_twice() -> None:
    problem = make_problem(**EVERYTHING)
    inputs = tuple(t.requires_grad_() for t in problem.tensors.values())
    loss = fused(problem).sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(bits_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["streaming", "reference"])
@pytest.mark.parametrize("average", [False, True])
def test_nothing_scored_stays_attached(average: bool, impl: str) -> None:
    """Exactly 0 with a zero gradient, alone and beside scored sequences; a detached result would fail backward."""
    problem = make_problem((5, 0, 1, 6), bias=True, lora_rank=2, average=average)
    problem = replace(problem, labels=problem.labels.index_fill(0, torch.arange(5), IGNORE))
    logps, _ = evaluate(lambda p: fused(p, impl=impl), problem)
    assert logps[:3].tolist() == [0.0, 0.0, 0.0]  # all ignored; empty; one token, which nothing predicts
    assert logps[3] < 0

    ignored = replace(problem, labels=torch.full_like(problem.labels, IGNORE))
    logps, grads = evaluate(lambda p: fused(p, impl=impl), ignored)
    assert logps.tolist() == [0.0] * 4
    assert grads["hidden"] is not None
    assert all(grad is None or (grad == 0).all() for grad in grads.values())
    if impl == "streaming":
        assert all(grad is not None for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_unscored_rows_may_hold_anything(dtype: torch.dtype) -> None:
    """NaN and infinity in rows of prompt and padding: every result has the same bits as without."""
    clean = make_problem((70, 200, 5), padded=True, **EVERYTHING).to(dtype)
    unscored = (clean.aligned == IGNORE)[..., None]
    garbage = torch.where(torch.rand(clean.hidden.shape) < 0.5, torch.nan, torch.inf).to(dtype)
    poisoned = replace(clean, hidden=torch.where(unscored, garbage, clean.hidden))
    expected, got = evaluate(fused, clean), evaluate(fused, poisoned)
    assert_same_bits(got, expected, "poisoned unscored rows")
    assert (present(got.grads["hidden"]) * unscored == 0).all()
    # Negative control: masking by a product lets the poison through.
    logits = poisoned.hidden.float() @ poisoned.weight.float().T
    assert (logits.log_softmax(-1)[..., 0] * ~unscored[..., 0]).sum().isnan()


def test_nan_stays_in_its_sequence() -> None:
    problem = make_problem((70, 200, 5), shift=False).to(torch.float32)
    clean = evaluate(fused, problem)
    row = int((problem.labels[70:270] != IGNORE).nonzero()[3]) + 70
    broken = evaluate(fused, replace(problem, hidden=problem.hidden.index_fill(0, torch.tensor([row]), torch.nan)))
    assert broken.logps[1].isnan()
    assert bits_equal(broken.logps[[0, 2]], clean.logps[[0, 2]])
    dhidden, expected = present(broken.grads["hidden"]), present(clean.grads["hidden"])
    assert dhidden[row].isnan().all()
    others = torch.arange(275) != row
    assert bits_equal(dhidden[others], expected[others])


def confident(level: float, gap: float) -> Problem:
    """64 rows sure of token 7: its logit is `level + gap`, the 499 others lie around `level`."""
    hidden, weight = 0.1 * torch.randn(64, 64), 0.1 * torch.randn(500, 64)
    hidden[:, :2], weight[:, :2] = torch.tensor([1.0, gap]), torch.tensor([level, 0.0])
    weight[7, 1] = 1.0
    return Problem(hidden, weight, torch.full((64,), 7), torch.arange(65), shift=False)


@pytest.mark.parametrize("gap", [6.0, 12.0, 16.0, 20.0])
@pytest.mark.parametrize("level", [0.0, 20.0, 1000.0])
def test_confident_target(level: float, gap: float) -> None:
    """p -> 1, where `1 - p` is 0.6 down to 6e-6: log-prob and gradient keep the relative precision of eager fp32.

    Logits of 20 are usual in trained models; a log-sum-exp rounded at that size costs `20 * eps` absolute, which is all
    of a small `1 - p`. Budget: three times eager's relative error, as one more rounding of the sum of exponentials (all
    of the error where `1 - p` nears eps) is worth a factor of two. dW adds up rows whose errors cancel by luck in eager
    code, so it is held to the relative error of the rows.
    """
    problem = confident(level, gap)
    truth = evaluate(naive_logps, problem.to(torch.float64))
    got, eager = evaluate(fused, problem), evaluate(naive_logps, problem)
    for name, budget_name in (("logps", "logps"), ("hidden", "hidden"), ("weight", "logps")):
        error = relative_error(part(got, name), part(truth, name))
        budget = 3 * relative_error(part(eager, budget_name), part(truth, budget_name))
        assert error <= budget, f"{name}: relative error {error:.2g}, budget {budget:.2g}"


def part(evaluation: Evaluation, name: str) -> Tensor:
    return evaluation.logps if name == "logps" else present(evaluation.grads[name])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    body, head = nn.Linear(9, 16), nn.Linear(16, 50, bias=False)
    inputs, labels = torch.randn(2, 7, 9, requires_grad=True), torch.randint(0, 50, (2, 7))

    def step(x: Tensor) -> Tensor:
        return fused_dpo_logps(body(x).tanh(), head.weight, labels)

    parameters = inputs, *body.parameters(), head.weight
    expected_logps = step(inputs)
    expected = torch.autograd.grad(expected_logps.sum(), parameters)
    logps = checkpoint(step, inputs, use_reentrant=use_reentrant)
    assert isinstance(logps, Tensor)
    logps.sum().backward()
    assert bits_equal(logps, expected_logps)
    assert all(bits_equal(p.grad, g) for p, g in zip(parameters, expected, strict=True))


def test_tied_embeddings() -> None:
    """One parameter as embedding and head: its gradient is the sum of both uses, in either order of arrival."""
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    input_ids = torch.randint(0, 50, (2, 9))

    def logps(head: Tensor, embedding: Tensor, function: Callable[[Problem], Tensor]) -> Tensor:
        return function(Problem(embedding[input_ids].tanh(), head, input_ids)).sum()

    (tied,) = grad_of(logps(weight, weight, fused), weight)
    (through_head,) = grad_of(logps(weight, weight.detach(), fused), weight)
    (through_embedding,) = grad_of(logps(weight.detach(), weight, fused), weight)
    (true,) = grad_of(logps(weight, weight, naive_logps), weight)
    assert_close("sum of uses", tied, through_head + through_embedding, 1e-14)  # float64, one addition
    assert_close("tied", tied, true, FLOAT64_GRADIENTS)


def test_gradients_accumulate_over_micro_batches() -> None:
    """(1 x 4) equals (4 x 1): the gradients of the sequences add up."""
    problem = make_problem((5, 70, 20, 3), bias=True)
    whole = evaluate(lambda p: fused(p).sum()[None], problem)
    parts: dict[str, Tensor] = {}
    for i in range(len(problem.spans)):
        for name, grad in evaluate(fused, compose(problem, [i])).grads.items():
            if name != "hidden":
                parts[name] = parts.get(name, torch.zeros(())) + present(grad)
    for name, total in parts.items():
        assert_close(f"d{name}", total, present(whole.grads[name]), 1e-12)  # float64, four parts


@pytest.mark.parametrize(
    "options", [KernelOptions(impl="streaming", workspace_mib=1), KernelOptions(impl="reference")], ids=["small", "ref"]
)
def test_options_do_not_change_gradients(options: KernelOptions) -> None:
    problem = make_problem((40, 30), V=5003, D=16)

    def call(p: Problem) -> Tensor:
        return fused_dpo_logps(p.hidden, p.head, p.labels, cu_seqlens=p.cu_seqlens, options=options)

    assert_agrees(evaluate(call, problem), problem)
