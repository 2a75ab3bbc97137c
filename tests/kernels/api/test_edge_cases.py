"""Inputs at the edge: empty batches, strange labels, strange layouts, extreme logits."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused_dpo import fused_dpo_logps
from tests.kernels.support.problems import (
    FLOAT64_GRADIENTS,
    FLOAT64_LOGPS,
    IGNORE,
    Evaluation,
    Problem,
    assert_agrees,
    assert_close,
    assert_same_bits,
    assert_within_budget,
    bits_equal,
    cu_seqlens,
    evaluate,
    fused,
    make_problem,
    naive_logps,
    present,
    truth_of,
)

pytestmark = pytest.mark.cpu_units

IMPLS = ["streaming", "reference"]
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(
    ("shape", "offsets", "sequences"),
    [((0,), [0], 0), ((0,), [0, 0, 0], 2), ((0, 4), None, 0), ((3, 0), None, 3), ((3, 1), None, 3)],
    ids=["no sequence", "empty sequences", "B = 0", "S = 0", "S = 1"],
)
def test_empty_batches(shape: tuple, offsets: list[int] | None, sequences: int, average: bool, impl: str) -> None:
    problem = Problem(
        torch.randn(*shape, 8),
        torch.randn(20, 8),
        torch.zeros(shape, dtype=torch.int64),
        None if offsets is None else torch.tensor(offsets, dtype=torch.int32),
        average=average,
    ).map(Tensor.requires_grad_)
    logps = fused(problem, impl=impl)
    assert logps.tolist() == [0.0] * sequences
    logps.sum().backward()
    assert present(problem.hidden.grad).shape == problem.hidden.shape
    assert problem.weight.grad is None or (problem.weight.grad == 0).all()


def test_repeated_offsets() -> None:
    """Empty sequences first, last and between give 0 and move nothing else."""
    problem = make_problem((5, 70, 20))
    offsets = torch.tensor([0, 0, 5, 5, 5, 75, 95, 95], dtype=torch.int32)
    logps = fused(replace(problem, cu_seqlens=offsets))
    assert logps[[0, 2, 3, 6]].tolist() == [0.0] * 4
    assert torch.equal(logps[[1, 4, 5]], fused(problem))
    repeated = replace(problem, cu_seqlens=offsets)
    assert_agrees(evaluate(fused, repeated), repeated)


def test_int64_offsets() -> None:
    problem = make_problem()
    wide = replace(problem, cu_seqlens=present(problem.cu_seqlens).long())
    assert torch.equal(fused(wide), fused(problem))


def test_average_divides_by_scored_tokens() -> None:
    problem = make_problem((5, 1, 70, 4))
    problem.labels[-4:] = IGNORE
    sums, means = fused(problem), fused(replace(problem, average=True))
    counts = torch.tensor([int((problem.aligned[start:stop] != IGNORE).sum()) for start, stop in problem.spans])
    assert counts.tolist()[1::2] == [0, 0]
    assert_close("means", means, sums / counts.clamp(min=1), 1e-15)  # one division
    assert means[1::2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8], ids=str)
def test_integer_labels_of_any_width(dtype: torch.dtype) -> None:
    problem = make_problem(V=100, ignore_index=100)
    problem = replace(problem, labels=problem.labels.masked_fill(problem.labels == IGNORE, 100))
    assert torch.equal(fused(replace(problem, labels=problem.labels.to(dtype))), fused(problem))
    assert_close("logps", fused(problem), naive_logps(problem), FLOAT64_LOGPS)


@pytest.mark.parametrize("ignore_index", [0, 3, 256, -1])
def test_ignore_index_within_the_vocabulary(ignore_index: int) -> None:
    """A padding token that is a real token: its rows are not scored, although its logits take part."""
    problem = make_problem((40, 50), ignore_index=ignore_index)
    problem = replace(problem, labels=problem.labels.masked_fill(problem.labels == IGNORE, ignore_index))
    assert_agrees(evaluate(fused, problem), problem)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [257, 2**31, -1, -101])
@pytest.mark.parametrize("shift", [False, True])
def test_label_out_of_range(bad: int, shift: bool, impl: str) -> None:
    problem = make_problem((40, 30), shift=shift)
    problem.labels[50] = bad
    with pytest.raises(
        ValueError, match=rf"labels must lie in \[0, V\) = \[0, 257\).* got {bad} for row {50 - shift};"
    ):
        fused(problem, impl=impl)


def test_bad_label_that_no_row_predicts_is_harmless() -> None:
    """The first label of a sequence is never scored, so a start-of-text id beyond the head does no harm."""
    problem = make_problem((4, 5))
    strange = replace(problem, labels=problem.labels.clone())
    strange.labels[[0, 4]] = 10**6
    assert torch.equal(fused(strange), fused(problem))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_label_views(dtype: torch.dtype) -> None:
    """`labels[1:]`, every other label and a transposed batch: pointers off any alignment."""
    hidden, weight = torch.randn(2, 9, 8), torch.randn(50, 8)
    labels = torch.randint(0, 50, (3, 20), dtype=dtype)
    for view in (labels[1:, 1:10], labels[1:, 2::2], labels[::2, -9:], labels[0, 1:19].view(9, 2).T):
        got = fused(Problem(hidden, weight, view))
        assert torch.equal(got, fused(Problem(hidden, weight, view.clone().contiguous())))
        assert_close("logps", got, naive_logps(Problem(hidden, weight, view).to(torch.float64)), 1e-5)  # fp32
    flat = labels.flatten()[1:10]
    packed = Problem(hidden[0], weight, flat, cu_seqlens([9]))
    assert torch.equal(fused(packed), fused(replace(packed, labels=flat.clone())))


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed,
    "strided": lambda t: torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0],
    "offset": lambda t: torch.cat((t.new_full((3,), torch.nan), t.flatten()))[3:].view(t.shape),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Non-contiguous tensors of every kind; their gradients have the right shape and values."""
    problem = make_problem((20, 70), padded=True, bias=True, lora_rank=3).to(dtype)

    def arrange(tensor: Tensor) -> Tensor:
        return layout(tensor) if tensor.ndim > 1 else tensor.repeat_interleave(2)[::2]

    assert_agrees(evaluate(lambda p: fused(p.map(arrange)), problem), problem)
    leaves = problem.map(lambda t: arrange(t).detach().requires_grad_())  # leaves that are not contiguous themselves
    fused(leaves).sum().backward()
    expected = evaluate(lambda p: fused(p).sum()[None] / -1.3, problem)  # the upstream of a single output is -1.3
    # The upstream of 1 is rounded above, so bf16 numbers may come out one unit apart.
    tolerance = FLOAT64_GRADIENTS if dtype == torch.float64 else torch.finfo(dtype).eps
    for name, tensor in leaves.tensors.items():
        assert_close(name, present(tensor.grad), present(expected.grads[name]), tolerance)


def test_batch_first_view_of_time_first_states() -> None:
    time_first = torch.randn(9, 2, 8)
    weight, labels = torch.randn(50, 8), torch.randint(0, 50, (2, 9))
    view = fused_dpo_logps(time_first.transpose(0, 1), weight, labels)
    assert torch.equal(view, fused_dpo_logps(time_first.transpose(0, 1).contiguous(), weight, labels))


def with_logits(logits: Tensor, labels: Tensor, **settings) -> Problem:
    """A problem whose logits are `logits` [T, V]: the hidden states are the logits, the weight is the identity."""
    T, V = logits.shape
    return Problem(logits, torch.eye(V, dtype=logits.dtype), labels, cu_seqlens([T]), shift=False, **settings)


@pytest.mark.parametrize("workspace_mib", [1, 64])
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits(scale: float, workspace_mib: int) -> None:
    """Logits of ±1e4 and far beyond: one token has all the mass, the others have none, nothing overflows."""
    logits = torch.linspace(-1, 1, 300).repeat(3, 1)[:, torch.randperm(300)] * scale
    labels = torch.stack((logits[0].argmax(), logits[1].argmin(), logits[2].abs().argmin()))
    problem = with_logits(logits, labels)
    truth = evaluate(naive_logps, problem.to(torch.float64))
    got = evaluate(lambda p: fused(p, workspace_mib=workspace_mib), problem)
    assert_close("logps", got.logps, truth.logps, 1e-6)  # fp32: the log-prob is a difference of two logits of its size
    # Softmax entries that are not 0 or 1 lie e^-67 apart; dz is exact up to the floor of the exponential, e^-60, and
    # what is left is the rounding of the result to fp32.
    assert_close("dhidden", present(got.grads["hidden"]), present(truth.grads["hidden"]), 1e-6)


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_common_offset(offset: float) -> None:
    """An offset that all logits share changes nothing, and costs the precision that the logits themselves lose."""
    base = make_problem((40, 30), bias=True)
    problem = replace(base, bias=present(base.bias) + offset).to(torch.float32)
    got, eager = evaluate(fused, problem), evaluate(naive_logps, problem)
    truth = evaluate(naive_logps, problem.to(torch.float64))
    for name in ("logps", "hidden", "weight", "bias"):
        values = [e.logps if name == "logps" else present(e.grads[name]) for e in (got, eager, truth)]
        assert_within_budget(name, *values)


def minus_infinity(problem: Problem, *tokens: int) -> Problem:
    assert problem.bias is not None
    return replace(problem, bias=problem.bias.index_fill(0, torch.tensor(tokens), -torch.inf))


def finite_truth(problem: Problem) -> Evaluation:
    """The truth where some bias is -inf: autograd's is finite as long as no label is such a token."""
    truth = evaluate(naive_logps, problem.to(torch.float64))
    assert truth.logps.isfinite().all()
    return truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "masked", [(3,), tuple(range(1900)), tuple(range(2000, 3900))], ids=["one", "first slices", "later slices"]
)
def test_minus_infinity_in_the_bias(masked: tuple[int, ...], dtype: torch.dtype) -> None:
    """Tokens that cannot occur (vocabulary padding): no mass, no gradient, no NaN, also where they fill a slice."""
    problem = make_problem((40, 30), V=5000, bias=True)
    labels = torch.where(torch.isin(problem.labels, torch.tensor(masked)), 4000, problem.labels)
    problem = minus_infinity(replace(problem, labels=labels), *masked).to(dtype)
    got, truth = evaluate(lambda p: fused(p, workspace_mib=1), problem), finite_truth(problem)
    eager = evaluate(naive_logps, problem)
    assert_within_budget("logps", got.logps, eager.logps, truth.logps)
    for name, grad in got.grads.items():
        assert_within_budget(name, present(grad), present(eager.grads[name]), present(truth.grads[name]))
    for name in ("weight", "bias"):
        assert (present(got.grads[name])[list(masked)].abs() < 1e-20).all()  # the exponential's floor is e^-60


def test_label_of_probability_zero() -> None:
    """A label whose logit is -inf: log-prob -inf, as the formula says, and no NaN elsewhere."""
    problem = minus_infinity(replace(make_problem((4, 30), bias=True, shift=False)), 5)
    problem.labels[:4] = torch.tensor([5, IGNORE, 1, 2])
    problem.labels[4:] = torch.where(problem.labels[4:] == 5, 6, problem.labels[4:])
    for impl in IMPLS:
        logps = fused(problem, impl=impl)
        assert logps[0] == -torch.inf
        assert_close("other", logps[1:], naive_logps(problem)[1:], FLOAT64_LOGPS)


def test_logits_beyond_half_precision() -> None:
    """fp16 inputs whose logits are 1.6e5, beyond fp16's 65504: kept in fp32, so nothing overflows."""
    hidden = torch.full((3, 16), 100.0) + torch.randn(3, 16)
    weight = torch.full((300, 16), 100.0) + torch.randn(300, 16) / 50
    problem = Problem(hidden, weight, torch.tensor([1, 2, 3]), cu_seqlens([3]), shift=False).to(torch.float16)
    truth, got = evaluate(naive_logps, problem.to(torch.float64)), evaluate(fused, problem)
    assert naive_logps(problem).isnan().all()  # negative control: fp16 logits are infinite
    assert (problem.hidden.double() @ problem.weight.double().T).max() > 1.5e5
    # The logits' own rounding: 1.6e5 in fp32 is spaced 1/64, over a sum of 16 products and three tokens.
    assert (got.logps - truth.logps).abs().max() < 0.2
    assert_close("dweight", present(got.grads["weight"]), present(truth.grads["weight"]), 0.05)  # e^(±3/64) of a p
    assert all(grad is None or grad.isfinite().all() for grad in got.grads.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_softcap_saturation(size: float, dtype: torch.dtype) -> None:
    """Logits below, at and far beyond the cap: bounded by it, with a gradient that dies out without NaN."""
    problem = with_logits(size * torch.randn(70, 100), torch.randint(0, 100, (70,)), softcap=30.0).to(dtype)
    got, truth, eager = evaluate(fused, problem), truth_of(problem), evaluate(naive_logps, problem)
    assert_within_budget("logps", got.logps, eager.logps, truth.logps)
    # The derivative 1 - tanh^2 is a difference: beside the budget, a few eps of the upstream gradient, which is 1.3.
    errors = [float((present(e.grads["hidden"]) - present(truth.grads["hidden"])).abs().max()) for e in (got, eager)]
    assert errors[0] <= 2 * errors[1] + 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert got.logps[0] > -70 * (60 + 5)  # -2 caps - log V a token
    saturated = problem.hidden.abs() > 20 * 30  # tanh(20) is 1 in float64
    assert (present(got.grads["hidden"])[saturated] == 0).all()
    assert saturated.any() == (size == 1e4)


def test_zero_weight_gives_the_uniform_distribution() -> None:
    problem = Problem(
        torch.randn(3, 4), torch.zeros(1000, 4), torch.tensor([0, 500, 999]), torch.arange(4), shift=False
    )
    assert_close(
        "logps", fused(problem), -torch.full((3,), 1000.0).log(), 2e-7
    )  # fp32: one rounding, log of an integer


def test_vocabulary_of_one_is_certain() -> None:
    problem = Problem(torch.randn(70, 4), torch.randn(1, 4), torch.zeros(70, dtype=torch.int64), cu_seqlens([70]))
    got = evaluate(fused, problem)
    assert got.logps.tolist() == [0.0]
    assert all((present(got.grads[name]) == 0).all() for name in ("hidden", "weight"))


def test_inputs_are_left_alone() -> None:
    problem = make_problem(bias=True, lora_rank=2, softcap=3.0).to(torch.bfloat16)
    before = [t.clone() for t in (*problem.tensors.values(), problem.labels)]
    evaluate(fused, problem)
    fused(problem.map(Tensor.requires_grad_)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (*problem.tensors.values(), problem.labels), strict=True))


def test_poisoned_neighbours_of_a_view() -> None:
    """Rows and columns next to the tensors in memory are never read."""
    problem = make_problem((20, 50), bias=True).to(torch.float32)

    def framed(tensor: Tensor) -> Tensor:
        frame = tensor.new_full([n + 2 for n in tensor.shape], torch.nan)
        inner = frame[tuple(slice(1, -1) for _ in tensor.shape)]
        return inner.copy_(tensor)

    assert_same_bits(evaluate(lambda p: fused(p.map(framed)), problem), evaluate(fused, problem), "framed")
    assert bits_equal(fused(problem.map(framed)), fused(problem))
