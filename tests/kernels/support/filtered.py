"""Calls, problems and errors that the tests of the filtered gradients share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fused_dpo import KernelOptions, TokenLogps
from fused_dpo.filtering import Judgement
from fused_dpo.hardware import has_bf16_units
from fused_dpo.head import VocabShard
from fused_dpo.streaming import filtered_backward
from tests.kernels.support.problems import (
    Evaluation,
    Problem,
    cu_seqlens,
    evaluate,
    fused,
    leaves,
    naive_logits,
    relative_error,
    tokens,
)

EPS, GUARD = KernelOptions.filter_eps, KernelOptions.tail_guard
UNITS = has_bf16_units(torch.device("cpu"))
coarse_only = pytest.mark.skipif(not UNITS, reason="the screen is coarse only on a CPU with bf16 units")


def filter_of(problem: Problem, **options) -> Tensor:
    return fused(problem, grad_mode="filtered", **options)


def exact_of(problem: Problem, **options) -> Tensor:
    return fused(problem, grad_mode="exact", **options)


def filtered_tokens(problem: Problem, with_stats: Sequence[str] = (), **options) -> TokenLogps:
    return tokens(problem, with_stats, impl="streaming", grad_mode="filtered", **options)


def gradients(problem: Problem, upstream: Tensor, grad_mode: str = "filtered", **options) -> list[Tensor]:
    """Those of the token log-probs times `upstream`, in the order of `problem.tensors`."""
    fresh = leaves(problem)
    logps = tokens(fresh, impl="streaming", grad_mode=grad_mode, **options).logps
    return list(torch.autograd.grad(logps, list(fresh.tensors.values()), upstream.to(logps.dtype)))


def one_sequence(hidden: Tensor, weight: Tensor, target: Tensor, **settings) -> Problem:
    return Problem(hidden, weight, target, torch.tensor([0, len(target)]), shift=False, **settings)


def vocabulary_problem(lengths: Sequence[int], D: int = 576, V: int = 49152) -> Problem:
    """Logits of standard deviation 8 in bf16: a row has a few hundred columns above eps, as on real hidden states."""
    hidden, weight = torch.randn(sum(lengths), D), 8 * torch.randn(V, D) / D**0.5
    labels = torch.randint(0, V, (sum(lengths),))
    return Problem(hidden, weight, labels, cu_seqlens(lengths), shift=False).to(torch.bfloat16)


class Judged(NamedTuple):
    """What a backward decided."""

    keep: Tensor
    """bool [blocks, V]."""
    block_of_row: Tensor
    """int64 [scored rows]."""


@contextmanager
def judgements() -> Iterator[list[Judged]]:
    """Those of all backwards within."""
    seen: list[Judged] = []

    class Recorder(Judgement):
        def columns(self, screen: Tensor, shard: VocabShard | None = None) -> tuple[Tensor, Tensor]:
            keep, everything = super().columns(screen, shard)
            seen.append(Judged(keep, self.block_of_row))
            return keep, everything

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filtered_backward, "Judgement", Recorder)
        yield seen


def naive_token_logps(problem: Problem) -> Tensor:
    """Of one sequence with aligned labels that are all scored."""
    return naive_logits(problem.hidden, problem).log_softmax(-1).gather(1, problem.labels[:, None]).squeeze(1)


class Errors(NamedTuple):
    """Largest of the log-probs', relative ones of the gradients, by mode."""

    naive: dict[str, float]
    filtered: dict[str, float]


def errors_of(problem: Problem, **options) -> Errors:
    def by_token(call: Callable[[Problem], Tensor]) -> Evaluation:
        return evaluate(call, problem)

    truth = evaluate(naive_token_logps, problem.to(torch.float64))

    def errors(got: Evaluation) -> dict[str, float]:
        found = {"logps": float((got.logps.double() - truth.logps).abs().max())}
        return found | {n: relative_error(grad, truth.grads[n]) for n, grad in got.grads.items() if grad is not None}

    return Errors(errors(by_token(naive_token_logps)), errors(by_token(lambda p: filtered_tokens(p, **options).logps)))
