"""Function transforms and forward mode: right by `impl="reference"`, one error by the kernels, never a zero."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_dpo import DPOLoss, get_batch_logps, sequence_sum
from fused_dpo.transforms import refuse_transforms
from tests.kernels.support.problems import (
    DIFFERENTIABLE,
    EVERY_FEATURE,
    FLOAT64_GRADIENTS,
    FLOAT64_LOGPS,
    Problem,
    assert_close,
    cu_seqlens,
    fused,
    make_problem,
    naive_logps,
    tokens,
)

Function = Callable[[Tensor], Tensor]
REFUSED = r"do not go through\s+them. Use options=KernelOptions\(impl='reference'\)"
KERNELS = (None, "streaming", "triton", "library")
STATS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs", "tail", "kept_fraction")


def forward_mode(function: Function, at: Tensor, along: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(at, along))).tangent
    assert tangent is not None
    return tangent


TRANSFORMS: dict[str, Callable[[Function, Tensor, Tensor], Tensor]] = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "jacfwd": lambda f, x, _: torch.func.jacfwd(f)(x),
    "forward_ad": forward_mode,
    "forward_ad with requires_grad": lambda f, x, t: forward_mode(f, x.clone().requires_grad_(), t).detach(),
    "forward_ad without gradients": lambda f, x, t: torch.no_grad()(forward_mode)(f, x, t),
    "linearize": lambda f, x, t: torch.func.linearize(f, x)[1](t),
    "grad": lambda f, x, _: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x, _: torch.func.vjp(f, x)[1](torch.tensor([1.5, -2.0]).to(x))[0],
    "jacrev": lambda f, x, _: torch.func.jacrev(f)(x),
    "hessian": lambda f, x, _: torch.func.hessian(lambda x: f(x).square().sum())(x),
    "jvp of grad": lambda f, x, t: torch.func.jvp(torch.func.grad(lambda x: f(x).sum()), (x,), (t,))[1],
    "vmap of grad": lambda f, x, t: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack((x, t))),
    "autograd.functional.jacobian": lambda f, x, _: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem_of(form: str = "packed", dtype: torch.dtype = torch.float64) -> Problem:
    return make_problem((3, 4), V=11, D=5, padded=form == "padded", **EVERY_FEATURE).to(dtype)


def as_function(call: Callable[..., Tensor], problem: Problem, name: str, **settings) -> Function:
    """The call as a function of one of its tensors."""
    return lambda x: call(replace(problem, **{name: x}), **settings)


def directed(problem: Problem, name: str) -> tuple[Tensor, Tensor]:
    """Where to differentiate with respect to a tensor, and along what."""
    at = problem.tensors[name]
    return at, torch.randn_like(at)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("form", ["packed", "padded"])
def test_reference_is_right(form: str, transform: str, name: str) -> None:
    problem = problem_of(form)
    apply, (at, along) = TRANSFORMS[transform], directed(problem, name)
    truth = apply(as_function(naive_logps, problem, name), at, along)
    assert truth.abs().max() > 1e-3, "control: zeros would not pass"
    got = apply(as_function(fused, problem, name, impl="reference"), at, along)
    assert_close(transform, got, truth, FLOAT64_GRADIENTS)


@pytest.mark.parametrize("grad_mode", ["exact", "filtered"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("impl", KERNELS)
def test_kernels_refuse(impl: str | None, transform: str, name: str, grad_mode: str) -> None:
    problem = problem_of("padded", torch.float32)
    function = as_function(fused, problem, name, impl=impl, grad_mode=grad_mode)
    with pytest.raises(NotImplementedError, match=REFUSED):
        TRANSFORMS[transform](function, *directed(problem, name))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("transform", ["jvp", "forward_ad", "grad"])
def test_token_logps_and_statistics(transform: str, name: str) -> None:
    """Statistics are constants to every derivative, so that they have no tangent."""
    problem = problem_of()
    apply, (at, along) = TRANSFORMS[transform], directed(problem, name)

    def sums(problem: Problem, impl: str | None) -> Tensor:
        result = tokens(problem, STATS, impl=impl)
        return sequence_sum(result.logps, torch.tensor([0, 3, 7])) + sum(result._asdict()[s].sum() for s in STATS)

    truth = apply(as_function(fused, problem, name, impl="reference"), at, along)
    if transform == "grad":  # of a square, to which they add
        constant = (sums(problem, "reference") - fused(problem, "reference")).detach()
        truth = apply(lambda x: as_function(fused, problem, name, impl="reference")(x) + constant, at, along)
    assert_close(transform, apply(as_function(sums, problem, name, impl="reference"), at, along), truth, 1e-12)
    with pytest.raises(NotImplementedError, match=REFUSED):
        apply(as_function(sums, problem, name, impl=None), at, along)


def test_control_without_the_check_the_tangent_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch does not say a word: it is the check that does."""
    monkeypatch.setattr("fused_dpo.api.refuse_transforms", lambda _: None)
    problem = problem_of()
    got = TRANSFORMS["jvp"](as_function(fused, problem, "hidden", impl="streaming"), *directed(problem, "hidden"))
    assert got.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
def test_what_is_constant_to_a_transform_is_computed(impl: str | None) -> None:
    """As are the reference's log-probs in a loss that is differentiated."""
    problem = problem_of(dtype=torch.float32)
    factor = torch.tensor([2.0, -1.0])
    logps = fused(problem, impl)
    assert torch.equal(torch.func.grad(lambda x: (x * fused(problem, impl)).sum())(factor), logps)
    assert torch.equal(torch.func.jvp(lambda x: x * fused(problem, impl), (factor,), (factor,))[1], factor * logps)
    with forward_ad.dual_level():
        assert torch.equal(fused(problem, impl), logps)


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
def test_vmap_without_gradients_is_right(impl: str | None) -> None:
    """Over hidden states, weights, or hidden states and labels, of which another number may be scored each time."""
    problem, other = (problem_of(dtype=torch.float32), make_problem((3, 4), 11, 5, seed=1).to(torch.float32))
    assert (problem.labels < 0).sum() != (other.labels < 0).sum()
    for names in (["hidden"], ["weight"], ["labels"], ["hidden", "labels"]):
        both = [torch.stack((getattr(problem, name), getattr(other, name))) for name in names]
        variants = [replace(problem, **{name: pair[i] for name, pair in zip(names, both, strict=True)}) for i in (0, 1)]
        truth = torch.stack([fused(variant, impl) for variant in variants])
        got = torch.func.vmap(
            lambda *one, names=names: fused(replace(problem, **dict(zip(names, one, strict=True))), impl)
        )(*both)
        assert_close("vmap", got, truth, 1e-6)  # fp32; the reference multiplies another shape at once


def test_gradients_of_every_pair() -> None:
    """`vmap(grad(...))` over examples: what people take `vmap` for. Rows that are not scored have gradients of 0."""
    problem, other = problem_of("padded"), make_problem((3, 4), 11, 5, padded=True, seed=1)
    hidden, labels = torch.stack((problem.hidden, other.hidden)), torch.stack((problem.labels, other.labels))
    hidden[0, 0, -1] = torch.nan  # predicts nothing

    def loss(weight: Tensor, hidden: Tensor, labels: Tensor, impl: str = "reference") -> Tensor:
        return fused(replace(problem, weight=weight, hidden=hidden, labels=labels), impl).square().sum()

    got = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, 0, 0))(problem.weight, hidden, labels)
    for i in (0, 1):
        weight, states = problem.weight.clone().requires_grad_(), hidden[i].clone().requires_grad_()
        truth = torch.autograd.grad(loss(weight, states, labels[i], "streaming"), (weight, states))
        for name, a, b in zip(("weight", "hidden"), got, truth, strict=True):
            assert_close(name, a[i], b, FLOAT64_GRADIENTS)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("where", ["vmap", "grad"])
def test_gradients_of_leaves_within_a_transform_are_refused(where: str, impl: str | None) -> None:
    problem = problem_of(dtype=torch.float32)
    problem = replace(problem, weight=problem.weight.requires_grad_())
    calls = {
        "vmap": lambda: torch.func.vmap(as_function(fused, problem, "hidden", impl=impl))(problem.hidden[None]),
        "grad": lambda: torch.func.grad(lambda x: (x * fused(problem, impl)).sum())(torch.ones(2)),
    }
    with pytest.raises(NotImplementedError, match=REFUSED):
        calls[where]()
    with torch.no_grad():
        calls["vmap"]()


@pytest.mark.parametrize("impl", [None, "reference"])
def test_functional_call_is_no_transform(impl: str | None) -> None:
    """It only puts other parameters into a module, and these have gradients by `backward()`."""
    problem = problem_of()

    class Head(torch.nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return fused(replace(problem, hidden=hidden, weight=self.weight), impl)

    weight = problem.weight.clone().requires_grad_()
    got = torch.func.functional_call(Head(5, 11, bias=False), {"weight": weight}, (problem.hidden,))
    truth = naive_logps(replace(problem, weight=weight))
    assert_close("logps", got, truth, FLOAT64_LOGPS)
    got_grad, true_grad = (torch.autograd.grad(logps.sum(), weight)[0] for logps in (got, truth))
    assert_close("dweight", got_grad, true_grad, FLOAT64_GRADIENTS)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("transform", ["jvp", "forward_ad", "grad", "linearize"])
@pytest.mark.parametrize("inside", [False, True], ids=["transform of compiled", "compiled transform"])
def test_compiled(transform: str, inside: bool, fullgraph: bool) -> None:
    """Refused, by torch where it does not compile such code at all; also by what was compiled before."""
    problem = problem_of(dtype=torch.float32)
    at, along = directed(problem, "hidden")
    function, apply = as_function(fused, problem, "hidden", impl=None), TRANSFORMS[transform]
    expected = function(at)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=fullgraph)
    assert torch.equal(compiled(at), expected)

    def call() -> Tensor:
        if not inside:
            return apply(compiled, at, along)
        return torch.compile(lambda x, t: apply(function, x, t), backend="aot_eager", fullgraph=fullgraph)(at, along)

    by_torch = "symbolically trace a dynamo-optimized"  # linearize, whatever the code
    if fullgraph:
        by_torch += "|functorch tracing|dual tensor input|marked as skipped"
    with pytest.raises((NotImplementedError, RuntimeError), match=f"{REFUSED}|{by_torch}"):
        call()
    assert torch.equal(compiled(at), expected)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("transform", ["jvp", "forward_ad", "grad"])
def test_reference_within_compiled_code(transform: str) -> None:
    """Where torch hands tangents to compiled code; its inductor drops those of `forward_ad`, whatever the code."""
    problem = problem_of()
    at, along = directed(problem, "hidden")
    apply, function = TRANSFORMS[transform], as_function(fused, problem, "hidden", impl="reference")
    compiled = torch.compile(function, backend="aot_eager")
    compiled(at)
    truth = apply(as_function(naive_logps, problem, "hidden"), at, along)
    assert_close(transform, apply(compiled, at, along), truth, FLOAT64_GRADIENTS)


@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name != "hessian"])
def test_sums_are_differentiable_in_every_way(transform: str) -> None:
    values, along = torch.randn(2, 6, dtype=torch.float64)
    offsets = cu_seqlens([2, 3]).long()  # the last row belongs to none
    truth = TRANSFORMS[transform](lambda v: torch.stack((v[:2].sum(), v[2:5].sum())), values, along)
    got = TRANSFORMS[transform](lambda v: sequence_sum(v, offsets), values, along)
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name not in ("hessian", "linearize")])
def test_full_logits_are_differentiable(transform: str) -> None:
    """But by linearize, which does not let labels be checked."""
    logits, along = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    labels = torch.randint(0, 7, (2, 5))
    labels[1, :2] = -100

    def plain(logits: Tensor) -> Tensor:
        logps = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
        return logps.masked_fill(labels[:, 1:] < 0, 0).sum(-1)

    truth, got = (TRANSFORMS[transform](f, logits, along) for f in (plain, lambda x: get_batch_logps(x, labels)))
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-12)


def test_losses_are_plain_torch() -> None:
    """So they go through every transform, as do log-probs of the reference implementation below them."""
    problem = make_problem((3, 4, 5, 4), V=11, D=5)

    def loss(hidden: Tensor, call: Callable[..., Tensor]) -> Tensor:
        logps = call(replace(problem, hidden=hidden))
        return DPOLoss(beta=0.1)(logps[0::2], logps[1::2], logps.new_zeros(2), logps.new_zeros(2)).loss

    at, along = directed(problem, "hidden")
    for transform in ("jvp", "grad"):
        got, truth = (
            TRANSFORMS[transform](lambda x, call=call: loss(x, call), at, along)
            for call in (lambda problem: fused(problem, "reference"), naive_logps)
        )
        assert_close(transform, got, truth, FLOAT64_GRADIENTS)


def test_what_is_no_tensor_is_left_to_the_checks_of_arguments() -> None:
    refuse_transforms([None, "weight"])  # pyright: ignore[reportArgumentType]
