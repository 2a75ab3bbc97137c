"""`reuse_exponentials=True`: what the exact forward leaves in the memory of the weight's gradient for the backward."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_dpo import LMHead
from fused_dpo.filtering import Filtering
from fused_dpo.gpu import backward as triton_backward
from fused_dpo.gpu import backward_from_exponentials
from fused_dpo.gpu.backward import slice_width
from fused_dpo.gpu.configs import SPLIT_COLUMNS
from fused_dpo.gpu.exponentials import SIDE, Exponentials, forward_config
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
    evaluate,
    fused,
    leaves,
    make_problem,
    relative_error,
    tokens,
    uninitialized_memory_is_nan,
)

PLAIN_HEAD = {name: value for name, value in EVERY_FEATURE.items() if name != "softcap"}


def keeping(problem: Problem, **options: Any) -> Tensor:
    return fused(problem, impl="triton", grad_mode="exact", reuse_exponentials=True, **options)


def computing(problem: Problem, **options: Any) -> Tensor:
    return fused(problem, impl="triton", grad_mode="exact", **options)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Exponentials]:
    """What every forward has kept."""
    made: list[Exponentials] = []
    allocate = Exponentials.empty

    def noted(*arguments: Any, **named: Any) -> Exponentials:
        made.append(allocate(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(Exponentials, "empty", noted)
    return made


def rows_that_fit(problem: Problem) -> int:
    """Of those that are scored, in whole blocks."""
    config = forward_config(problem.hidden, problem.head)
    block = max(config.block_t, min(SIDE, config.block_v))
    scored = int((problem.aligned != IGNORE).sum())
    return min(problem.hidden.shape[-1], scored) // block * block


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": True},
        {"logit_scale": 0.3},
        {"temperature": 1.9},
        {"lora_rank": 17},
        PLAIN_HEAD,
        {"padded": True, **PLAIN_HEAD},
    ],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_options(settings: dict[str, Any], dtype: torch.dtype, kept: list[Exponentials]) -> None:
    """Some rows are kept, and some do not fit."""
    problem = on_device(make_problem((50, 83, 1, 108), V=167, D=150, **settings).to(dtype))
    assert_agrees(evaluate(keeping, problem), problem)
    assert [one.rows for one in kept] == [rows_that_fit(problem)]
    assert 0 < kept[0].rows < 200


@pytest.mark.parametrize("V", [1, 31, 32, 65])
@pytest.mark.parametrize("D", [1, 31, 32, 65, 200])
def test_sizes_at_every_edge(V: int, D: int) -> None:
    """Nothing fits, a block fits, all rows fit; rows end within a block, and with one."""
    for lengths in ((70,), (128,), (40, 0, 30)):
        problem = on_device(make_problem(lengths, V=V, D=D, shift=False).to(torch.float32))
        assert_agrees(evaluate(keeping, problem), problem)


@pytest.mark.parametrize("needs", [subset for subset in SUBSETS if "weight" in subset], ids="+".join)
def test_every_subset_of_gradients(needs: Sequence[str], kept: list[Exponentials]) -> None:
    problem = on_device(make_problem((70, 80), V=40, D=130, **PLAIN_HEAD).to(torch.float32))
    assert_agrees(evaluate(keeping, problem, needs), problem, needs)
    assert kept[0].rows > 0


def test_several_splits_and_slices(kept: list[Exponentials]) -> None:
    """Columns are read before the slice of the gradient that they lie in is written, and not after."""
    V = SPLIT_COLUMNS + 300
    problem = on_device(make_problem((60, 40), V=V, D=40, shift=False).to(torch.float32))
    assert slice_width(int((problem.aligned != IGNORE).sum()), V, 4, 2**20) < V, (
        "the backward has to take more than one slice"
    )
    assert_agrees(evaluate(lambda p: keeping(p, workspace_mib=1), problem), problem)
    assert kept[0].rows == rows_that_fit(problem) > 0


def test_the_gradient_is_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd takes it as the leaf's gradient as it is: nothing else holds it by then."""
    places: list[int] = []
    allocate = Exponentials.empty

    def noted(*arguments: Any, **named: Any) -> Exponentials:
        made = allocate(*arguments, **named)
        places.append(made.gradient.data_ptr())
        return made

    monkeypatch.setattr(Exponentials, "empty", noted)
    problem = leaves(on_device(make_problem((130,), V=40, D=150).to(torch.float32)))
    keeping(problem).sum().backward()
    assert problem.weight.grad is not None
    assert places == [problem.weight.grad.data_ptr()]


def test_control_what_is_kept_is_what_is_used(kept: list[Exponentials]) -> None:
    """Gradients of the hidden states follow what stands in the memory, in the rows that were kept and in no other."""
    problem = on_device(make_problem((200,), V=40, D=150, shift=False).to(torch.float32))
    problem = replace(problem, labels=problem.labels.clamp(min=0))
    rows = rows_that_fit(problem)
    expected = evaluate(keeping, problem).grads["hidden"]
    fresh = leaves(problem)
    logps = keeping(fresh)
    kept[-1].gradient.zero_()
    (got,) = torch.autograd.grad(logps.sum(), fresh.hidden)
    assert expected is not None
    (whole,) = torch.autograd.grad(keeping(fresh).sum(), fresh.hidden)
    assert bits_equal(got[rows:], whole[rows:])
    assert 0 < rows < 200
    assert (got[:rows] != whole[:rows]).any(1).all()


def test_fewer_rows_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    class Noted(triton_backward.DLogits):
        def __init__(self, scored_rows: triton_backward.ScoredRows, *arguments: Any, **named: Any) -> None:
            computed.append(len(scored_rows.hidden))
            super().__init__(scored_rows, *arguments, **named)

    monkeypatch.setattr(backward_from_exponentials, "DLogits", Noted)
    problem = on_device(make_problem((200,), V=40, D=150, shift=False).to(torch.float32))
    problem = replace(problem, labels=problem.labels.clamp(min=0))
    evaluate(keeping, problem)
    assert computed == [200 - rows_that_fit(problem)]


def test_a_weight_in_fp32_holds_twice_as_many_rows(kept: list[Exponentials]) -> None:
    """As autocast leaves it: exponentials in fp16 in a gradient in fp32."""
    D = 70
    problem = on_device(make_problem((300,), V=90, D=D, shift=False).to(torch.float16))
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.float().requires_grad_()
    offsets = torch.tensor([0, 300], device=DEVICE)
    arguments: Any = (
        hidden,
        problem.labels.clamp(min=0),
        offsets,
        None,
        LMHead(weight),
        "triton",
        1,
        Filtering(0.0, 0.0),
    )
    results = []
    for keep in (True, False):
        logps, *_ = token_logps(*arguments, want_stats=False, reuse_exponentials=keep)
        results.append((logps.detach(), *torch.autograd.grad(logps.sum(), (hidden, weight))))
    assert 2 * D - 64 < kept[0].rows <= 2 * D
    (logps, dhidden, dweight), expected = results
    assert bits_equal(logps, expected[0])
    assert dweight.dtype == torch.float32
    assert relative_error(dhidden, expected[1]) < 2**-10  # dz is rounded twice
    assert relative_error(dweight, expected[2]) < 2**-10


def test_run_to_run_and_batch_invariance() -> None:
    """The same bits without a gradient, where nothing is kept, too."""
    assert_invariant(keeping, V=70)


def test_a_backward_again_computes_everything(kept: list[Exponentials]) -> None:
    """What was kept is written over by the first."""
    problem = leaves(on_device(make_problem((200,), V=40, D=150).to(torch.float32)), ("hidden", "weight"))
    inputs = problem.hidden, problem.weight
    logps = keeping(problem)
    first = torch.autograd.grad(logps.sum(), inputs, retain_graph=True)
    before = [grad.clone() for grad in first]
    again = torch.autograd.grad(logps.sum(), inputs, retain_graph=True)
    expected = torch.autograd.grad(computing(problem).sum(), inputs)
    assert kept[0].rows > 0
    for one, copy, other, plain in zip(first, before, again, expected, strict=True):
        assert bits_equal(one, copy), "the second writes into the first's memory"
        assert bits_equal(other, plain)
        assert relative_error(one, plain) < 1e-6


def test_second_derivatives_are_refused() -> None:
    problem = leaves(on_device(make_problem((100,), V=40, D=150).to(torch.float32)))
    (dhidden,) = torch.autograd.grad(keeping(problem).sum(), problem.hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        dhidden.sum().backward()


def test_nothing_is_held_without_a_backward_of_the_weight(kept: list[Exponentials]) -> None:
    problem = on_device(make_problem((100,), V=40, D=150).to(torch.float32))
    expected = keeping(leaves(problem)).detach()
    assert kept.pop().rows > 0
    with torch.no_grad():
        assert bits_equal(keeping(leaves(problem)), expected)
    assert_agrees(evaluate(keeping, problem, ("hidden",)), problem, ("hidden",))
    compiled = torch.compile(keeping, backend="aot_eager")
    fresh = leaves(problem)
    grads = torch.autograd.grad(compiled(fresh).sum(), (fresh.hidden, fresh.weight))
    plain = torch.autograd.grad(computing(fresh).sum(), (fresh.hidden, fresh.weight))
    assert all(map(bits_equal, grads, plain))
    assert len(kept) == 3
    assert all(one.rows == 0 == one.gradient.numel() for one in kept)


@pytest.mark.parametrize("instead", ["softcap", "stats", "filtered", "library", "streaming"])
def test_elsewhere_it_has_no_effect(instead: str, kept: list[Exponentials]) -> None:
    softcap = 9.0 if instead == "softcap" else None
    problem = on_device(make_problem((100,), V=40, D=150, softcap=softcap).to(torch.float32))
    impl = instead if instead in ("library", "streaming") else "triton"

    def by(p: Problem, **options: Any) -> Tensor:
        mode = "filtered" if instead == "filtered" else "exact"
        stats = ("entropy",) if instead == "stats" else ()
        return tokens(p, stats, impl, grad_mode=mode, **options).logps

    assert_same_bits(evaluate(lambda p: by(p, reuse_exponentials=True), problem), evaluate(by, problem), instead)
    assert not kept


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_no_uninitialised_memory_is_read(dtype: torch.dtype) -> None:
    problem = on_device(make_problem((105, 23), V=67, D=120, **PLAIN_HEAD).to(dtype))
    expected = evaluate(keeping, problem)
    with uninitialized_memory_is_nan():
        assert_same_bits(evaluate(keeping, problem), expected, "poisoned buffers")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_upstream_that_is_no_number_stays_in_its_row(dtype: torch.dtype, bad: float) -> None:
    problem = on_device(make_problem((72,), V=300, D=70, shift=False).to(dtype))
    fresh = leaves(replace(problem, labels=problem.labels.clamp(min=0)))
    upstream = torch.ones(72, device=DEVICE)
    upstream[3] = bad
    logps = tokens(fresh, [], "triton", grad_mode="exact", reuse_exponentials=True).logps
    dhidden, _ = torch.autograd.grad(logps, (fresh.hidden, fresh.weight), upstream)
    odd = dhidden.isfinite().all(1).logical_not() if bad else (dhidden == 0).all(1)
    assert odd.nonzero().tolist() == [[3]]


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_confident_and_extreme_rows(scale: float) -> None:
    """Columns far above and far below those that the tile of the same row had seen before."""
    problem = make_problem((200,), V=300, D=150, bias=True, shift=False)
    bias = torch.linspace(-3 * scale, 3 * scale, 300, dtype=torch.float64)
    for order in (bias, bias.flip(0)):
        shaped = on_device(replace(problem, bias=order).to(torch.float32))
        assert_agrees(evaluate(keeping, shaped), shaped, DIFFERENTIABLE)
