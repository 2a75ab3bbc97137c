"""Problems, the truth, and the error budget of the head's tests.

`naive_logps` is the code everybody writes, a few lines of plain torch with one loop over sequences, that shares nothing
with the package. Evaluated in float64 it is the truth; evaluated in the dtype under test it is the same-dtype eager
error that the budget is made of.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, combinations, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_dpo import KernelOptions, LMHead, TokenLogps, fused_dpo_logps, fused_token_logps

IGNORE = -100
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("hidden", "weight", "bias", "lora_a", "lora_b")
SUBSETS = list(chain.from_iterable(combinations(DIFFERENTIABLE, k) for k in range(1, 6)))
"""All that may be asked for, everything last."""
EVERY_FEATURE = {"bias": True, "lora_rank": 3, "logit_scale": 1.7, "softcap": 9.0, "temperature": 0.7}
"""Settings of `make_problem`."""
FLOAT64_LOGPS, FLOAT64_GRADIENTS = 1e-12, 1e-10
"""Sums of up to 1e4 terms in float64 (eps 2e-16), in another order than the truth's; nothing else differs."""


@dataclass(frozen=True)
class Problem:
    """One call: tensors and settings. `hidden` is [B, S, D], or [T, D] with `cu_seqlens`."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None = None
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    lora_scale: float = 1.5
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    shift: bool = True
    average: bool = False
    ignore_index: int = IGNORE

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same numbers, rounded to `dtype`."""
        return self.map(lambda tensor: tensor.to(dtype))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Problem":
        """The problem with every differentiable tensor changed."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors.items()})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The differentiable tensors that are there."""
        named = {name: getattr(self, name) for name in DIFFERENTIABLE}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def lora(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.lora_a is None or self.lora_b is None else (self.lora_a, self.lora_b, self.lora_scale)

    @property
    def head(self) -> LMHead:
        return LMHead(self.weight, self.bias, self.logit_scale, self.softcap, self.temperature, self.lora)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Row range of every sequence in the flattened hidden states."""
        if self.cu_seqlens is None:
            B, S = self.labels.shape
            return [(i * S, (i + 1) * S) for i in range(B)]
        bounds = self.cu_seqlens.tolist()
        return list(pairwise(bounds))

    @property
    def aligned(self) -> Tensor:
        """Label that each row predicts, in the shape of the labels; `ignore_index` where there is none."""
        labels = self.labels.reshape(-1).long()
        if self.shift:
            unshifted, labels = labels, torch.full_like(labels, self.ignore_index)
            for start, stop in self.spans:
                labels[start : max(stop - 1, start)] = unshifted[start + 1 : stop]
        return labels.view(self.labels.shape)


def make_problem(
    lengths: Sequence[int] = (5, 40, 1, 23),
    V: int = 257,
    D: int = 33,
    *,
    padded: bool = False,
    bias: bool = False,
    lora_rank: int = 0,
    seed: int = 0,
    **settings,
) -> Problem:
    """Random float64 sequences of the given lengths with logits of standard deviation 3, a third of labels ignored."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    labels = [torch.randint(0, V, (n,), generator=rng) for n in lengths]
    labels = [row.masked_fill(torch.rand(row.shape, generator=rng) < 1 / 3, IGNORE) for row in labels]
    hidden = [normal(n, D) for n in lengths]
    if padded:
        S = max(lengths)
        settings["labels"] = torch.stack([torch.cat((r, r.new_full((S - len(r),), IGNORE))) for r in labels])
        settings["hidden"] = torch.stack([torch.cat((h, normal(S - len(h), D))) for h in hidden])
    else:
        settings["labels"] = torch.cat(labels)
        settings["hidden"] = torch.cat(hidden)
        settings["cu_seqlens"] = cu_seqlens(lengths)
    if bias:
        settings["bias"] = normal(V)
    if lora_rank:
        settings["lora_a"] = normal(lora_rank, D) / D**0.5
        settings["lora_b"] = normal(V, lora_rank)
    return Problem(weight=3 * normal(V, D) / D**0.5, **settings)


def dtype_id(dtype: torch.dtype) -> str:
    """Its name as a test's id."""
    return str(dtype).removeprefix("torch.")


def cu_seqlens(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def compose(problem: Problem, order: Sequence[int]) -> Problem:
    """The packed batch of the sequences of `problem` in another order, with omissions and repetitions."""
    spans = [problem.spans[i] for i in order]
    return replace(
        problem,
        hidden=torch.cat([problem.hidden[a:b] for a, b in spans]),
        labels=torch.cat([problem.labels[a:b] for a, b in spans]),
        cu_seqlens=cu_seqlens([b - a for a, b in spans]).to(problem.hidden.device),
    )


def naive_logits(hidden: Tensor, problem: Problem) -> Tensor:
    """All logits in the dtype of the inputs, then fp32 (float64 stays)."""
    logits = hidden @ problem.weight.T
    if problem.lora is not None:
        a, b, scale = problem.lora
        logits = logits + scale * (hidden @ a.T) @ b.T
    if problem.bias is not None:
        logits = logits + problem.bias
    logits = logits * problem.logit_scale
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    return (logits / problem.temperature).to(torch.promote_types(logits.dtype, torch.float32))


def naive_logps(problem: Problem) -> Tensor:
    """Sequence log-probs, one sequence at a time."""
    hidden, labels = problem.hidden.reshape(-1, problem.hidden.shape[-1]), problem.labels.reshape(-1).long()
    logps = []
    for start, stop in problem.spans:
        h, y = hidden[start:stop], labels[start:stop]
        if problem.shift:
            h, y = h[:-1], y[1:]
        scored = y != problem.ignore_index
        token_logps = naive_logits(h[scored], problem).log_softmax(-1).gather(1, y[scored, None])
        logps.append(token_logps.sum() / (max(len(token_logps), 1) if problem.average else 1))
    return torch.stack(logps)


def fused(
    problem: Problem,
    impl: str | None = "streaming",
    grad_mode: str | None = None,
    row_index: Tensor | None = None,
    **options,
) -> Tensor:
    """The call under test."""
    return fused_dpo_logps(
        problem.hidden,
        problem.head,
        problem.labels,
        cu_seqlens=problem.cu_seqlens,
        shift=problem.shift,
        average=problem.average,
        ignore_index=problem.ignore_index,
        row_index=row_index,
        grad_mode=grad_mode,
        options=KernelOptions(impl=impl, **options),
    )


def tokens(
    problem: Problem,
    with_stats: Collection[str] = (),
    impl: str | None = None,
    grad_mode: str | None = None,
    row_index: Tensor | None = None,
    **options,
) -> TokenLogps:
    """The same per token, with statistics."""
    return fused_token_logps(
        problem.hidden,
        problem.head,
        problem.labels,
        cu_seqlens=problem.cu_seqlens,
        shift=problem.shift,
        ignore_index=problem.ignore_index,
        row_index=row_index,
        with_stats=with_stats,
        grad_mode=grad_mode,
        options=KernelOptions(impl=impl, **options),
    )


class Evaluation(NamedTuple):
    """Log-probs and the gradients of `(logps * upstream).sum()` by name."""

    logps: Tensor
    grads: dict[str, Tensor | None]


def upstream_like(logps: Tensor) -> Tensor:
    """Non-uniform, of both signs, never 0."""
    return torch.linspace(-1.5, 2.1, len(logps)).to(logps) if len(logps) > 1 else torch.full_like(logps, -1.3)


def leaves(problem: Problem, needs: Sequence[str] = DIFFERENTIABLE) -> Problem:
    """A copy whose tensors are fresh leaves of autograd; those of `needs` require a gradient."""
    copies = {name: t.detach().clone().requires_grad_(name in needs) for name, t in problem.tensors.items()}
    return replace(problem, **copies)


def evaluate(
    function: Callable[[Problem], Tensor], problem: Problem, needs: Sequence[str] = DIFFERENTIABLE
) -> Evaluation:
    """Run `function` on fresh leaves and differentiate with respect to those of `needs`."""
    fresh = leaves(problem, needs)
    logps = function(fresh)
    (logps * upstream_like(logps)).sum().backward()
    return Evaluation(logps.detach(), {name: leaf.grad for name, leaf in fresh.tensors.items()})


def truth_of(problem: Problem, needs: Sequence[str] = DIFFERENTIABLE) -> Evaluation:
    """The numbers the problem's (possibly rounded) inputs stand for, in float64."""
    return evaluate(naive_logps, problem.to(torch.float64), needs)


def assert_close(name: str, got: Tensor, truth: Tensor, tolerance: float) -> None:
    """`max |got - truth| <= tolerance * max |truth|`; the largest entry sets the scale, as it does for rounding."""
    error, scale = _max(got.double() - truth.double()), _max(truth.double())
    assert error <= tolerance * scale, f"{name}: error {error:.3g} of {scale:.3g}, tolerance {tolerance:.3g}"


def assert_within_budget(name: str, got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The house's budget: largest and RMS error at most twice those of same-dtype eager code.

    Four units in the last place (of fp32 for half precision) come on top; for the largest error alone also half a unit
    of the result's own dtype at the largest truth, as no result can be closer than its rounding. Where fewer than 64
    numbers are compared eager code can be exact by luck, so there the scale is at least 1, the size of the inputs.
    """
    assert got.shape == truth.shape, f"{name}: shape {list(got.shape)}, expected {list(truth.shape)}"
    errors, eager_errors = got.double() - truth, eager.double() - truth
    eps = torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps
    for kind, norm in (("max", _max), ("rms", _rms)):
        scale = max(norm(truth), 1.0 if truth.numel() < 64 else 0.0)
        rounding = 4 * eps + (torch.finfo(got.dtype).eps / 2 if kind == "max" and got.dtype.itemsize == 2 else 0.0)
        error, budget = norm(errors), 2 * norm(eager_errors) + rounding * scale
        assert error <= budget, (
            f"{name}: {kind} error {error:.3g}, budget {budget:.3g} (eager {norm(eager_errors):.3g})"
        )


def assert_agrees(got: Evaluation, problem: Problem, needs: Sequence[str] = DIFFERENTIABLE) -> None:
    """Log-probs and the gradients asked for, against the truth: `FLOAT64_*`, within the budget in other dtypes."""
    truth = truth_of(problem, needs)
    exact = problem.hidden.dtype == torch.float64
    eager = truth if exact else evaluate(naive_logps, problem, needs)
    named = {"logps": (got.logps, eager.logps, truth.logps)}
    for name, grad in got.grads.items():
        named[f"d{name}"] = (grad, eager.grads[name], truth.grads[name])  # pyright: ignore[reportArgumentType]
    for name, (value, eager_value, true_value) in named.items():
        if true_value is None:
            assert value is None, f"{name} was not asked for"
        elif exact:
            assert_close(name, value, true_value, FLOAT64_LOGPS if name == "logps" else FLOAT64_GRADIENTS)
        else:
            assert_within_budget(name, value, eager_value, true_value)


def present(tensor: Tensor | None) -> Tensor:
    """A tensor that has to be there."""
    assert tensor is not None
    return tensor


def relative_error(got: Tensor | None, truth: Tensor | None) -> float:
    """`|got - truth| / |truth|` in the Frobenius norm."""
    got, truth = present(got), present(truth)
    return float((got.double() - truth).norm() / truth.norm())


def bits_equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Same bits; NaNs and signs of zero count."""
    if a is None or b is None:
        return a is b
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def assert_same_bits(a: Evaluation, b: Evaluation, what: str) -> None:
    assert bits_equal(a.logps, b.logps), f"{what}: logps differ by {_max(a.logps - b.logps):.3g}"
    for name, grad in a.grads.items():
        assert bits_equal(grad, b.grads[name]), f"{what}: d{name} differs"


@contextmanager
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Every `torch.empty` is filled with NaN (or the largest integer)."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would ask for a setting, and raise without it
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


def _max(values: Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0


def _rms(values: Tensor) -> float:
    return float(values.detach().double().square().mean().sqrt()) if values.numel() else 0.0
