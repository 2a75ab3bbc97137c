"""Problems for the checks on a GPU: sizes, small packed cases, and the ways that compute them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_dpo import KernelOptions, LMHead, fused_dpo_logps, fused_token_logps

IMPLS = ("triton", "library")
SLOPE = 3.0
"""Logits of peaked cases fall by this times the logarithm of the column's number, as byte-pair vocabularies begin with
their most frequent tokens; of normal logits alone the filter drops nothing."""


class NotHereError(Exception):
    """The check has nothing to say on this device."""


@dataclass(frozen=True)
class Scale:
    """Sizes of the checks, and where they run."""

    device: str = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    lengths: tuple[int, ...] = (1, 63, 257, 700, 128, 2)
    V: int = 50257
    D: int = 1024
    large_vocab: int = 262144
    large_dim: int = 8192
    filter_vocab: int = 151936
    filter_dim: int = 1024
    hidden_file: Path | None = None
    """File of real hidden states, for the check of filtered gradients; see `replay`."""


SMALL = Scale("cpu", (torch.float16, torch.float32), (1, 17, 30), V=200, D=32, large_vocab=100, large_dim=16,
    filter_vocab=1200, filter_dim=16)  # fmt: skip


class Case(NamedTuple):
    """A packed problem, aligned (`shift=False`), a third of its rows not scored."""

    hidden: Tensor
    head: LMHead
    labels: Tensor
    cu_seqlens: Tensor
    upstream: Tensor

    def logps(
        self,
        impl: str,
        grad_mode: str = "exact",
        *,
        shift: bool = False,
        row_index: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Compute the log-probs by the package."""
        arguments: Any = {"cu_seqlens": self.cu_seqlens, "shift": shift, "grad_mode": grad_mode}
        arguments["row_index"] = row_index
        arguments["options"] = KernelOptions(impl=impl, **options)
        return fused_dpo_logps(self.hidden, self.head, self.labels, **arguments)

    def kept_fraction(self, impl: str) -> float:
        """Measure the fraction of the vocabulary that filtered gradients keep, on the average of the scored rows."""
        arguments: Any = {"cu_seqlens": self.cu_seqlens, "shift": False, "grad_mode": "filtered"}
        arguments |= {"with_stats": ("kept_fraction",), "options": KernelOptions(impl=impl)}
        kept = fused_token_logps(self.hidden.detach(), self.head, self.labels, **arguments).kept_fraction
        assert kept is not None
        return float(kept[self.labels >= 0].mean())

    def to(self, dtype: torch.dtype) -> "Case":
        """Convert the numbers to another dtype."""
        bias = None if self.head.bias is None else self.head.bias.to(dtype)
        head = replace(self.head, weight=self.head.weight.to(dtype), bias=bias)
        return self._replace(hidden=self.hidden.to(dtype), head=head)

    def leaves(self) -> "Case":
        """Put the problem on fresh leaves."""
        weight = self.head.weight.detach().clone().requires_grad_()
        hidden = self.hidden.detach().clone().requires_grad_()
        return self._replace(hidden=hidden, head=replace(self.head, weight=weight))


@lru_cache(maxsize=4)  # drawing 50 million numbers takes half a second
def make_case(scale: Scale, dtype: torch.dtype, *, peaked: bool = False, extras: bool = False) -> Case:
    """Draw random hidden states and head with logits of standard deviation 3; a bias and a softcap as `extras`."""
    V, D, rng = scale.V, scale.D, torch.Generator().manual_seed(0)
    T = sum(scale.lengths)
    labels = torch.randint(V, (T,), generator=rng).masked_fill(torch.rand(T, generator=rng) < 1 / 3, -100)
    hidden = torch.randn(T, D, generator=rng)
    weight = 3 * torch.randn(V, D, generator=rng) / D**0.5
    if peaked:
        hidden[:, 0] = 1.0
        weight[:, 0] = -SLOPE * torch.arange(1, V + 1).log()
    head = LMHead(
        weight.to(scale.device, dtype),
        torch.randn(V, generator=rng).to(scale.device, dtype) if extras else None,
        softcap=(30.0 if peaked else 10.0) if extras else None,
    )
    offsets = torch.tensor([0, *scale.lengths]).cumsum(0).to(scale.device, torch.int32)
    upstream = torch.randn(len(scale.lengths), generator=rng).to(scale.device)
    return Case(hidden.to(scale.device, dtype), head, labels.to(scale.device), offsets, upstream)


def with_adapter(case: Case, rank: int = 12) -> Case:
    """Put a low-rank adapter on the problem's head."""
    V, D = case.head.weight.shape
    rng = torch.Generator().manual_seed(1)
    a, b = (torch.randn(*shape, generator=rng).to(case.hidden) / D**0.5 for shape in ((rank, D), (V, rank)))
    return case._replace(head=replace(case.head, lora=(a, b, 2.0)))


def eager_logps(case: Case) -> Tensor:
    """Compute log-probs by the usual code in the inputs' dtype: logits, then log-softmax in fp32 (float64 stays)."""
    logits = case.hidden @ case.head.weight.T
    if case.head.bias is not None:
        logits = logits + case.head.bias
    if case.head.softcap is not None:
        logits = case.head.softcap * torch.tanh(logits / case.head.softcap)
    token_logps = F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    picked = token_logps.gather(1, case.labels.clamp(min=0)[:, None]).squeeze(1)
    picked = picked.masked_fill(case.labels < 0, 0.0)
    lengths = case.cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    return torch.zeros(len(lengths), dtype=picked.dtype, device=picked.device).index_add(0, sequence, picked)


WAYS: dict[str, Callable[..., Tensor]] = {
    f"{impl}, {mode}": partial(Case.logps, impl=impl, grad_mode=mode)
    for impl, mode in product(IMPLS, ("exact", "filtered"))
}


WAYS["triton, exact, kept"] = partial(Case.logps, impl="triton", grad_mode="exact", reuse_exponentials=True)


def cases_of(
    scale: Scale, dtype: torch.dtype, *, extras: bool = False
) -> Iterator[tuple[str, Callable[..., Tensor], Case]]:
    """Walk every way with a flat case, and where it filters with a peaked one as well: name, function, case."""
    flat, peaked = (make_case(scale, dtype, peaked=shape, extras=extras) for shape in (False, True))
    for way, function in WAYS.items():
        yield f"{way}, {dtype}", function, flat
        if "filtered" in way:
            yield f"{way}, peaked, {dtype}", function, peaked


def evaluate(case: Case, function: Callable[[Case], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log-probs and the gradients of hidden states and weight."""
    leaves = case.leaves()
    logps = function(leaves)
    dhidden, dweight = torch.autograd.grad(logps, (leaves.hidden, leaves.head.weight), case.upstream.to(logps.dtype))
    return logps.detach(), dhidden, dweight
