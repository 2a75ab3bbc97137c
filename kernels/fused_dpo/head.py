"""The language-model head as the kernels see it: a weight and the few things that happen to its logits."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class LowRankAdapter(NamedTuple):
    """LoRA on the head, `logits += scale * (hidden @ a.T) @ b.T` (Hu et al., 2021, arXiv 2106.09685, section 4.1)."""

    a: Tensor
    """Down projection [r, D]."""
    b: Tensor
    """Up projection [V, r]."""
    scale: float
    """`alpha / r` of the adapter."""


@dataclass(frozen=True)
class LMHead:
    """A language-model head.

    `logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias + lora) / softcap) / temperature`, where a missing
    part drops out.
    """

    weight: Tensor
    """[V, D], floating point."""
    bias: Tensor | None = None
    """[V]."""
    logit_scale: float = 1.0
    """Factor on the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`)."""
    softcap: float | None = None
    """Bound of the logits (Gemma 2's `final_logit_softcapping`), positive."""
    temperature: float = 1.0
    """Sampling temperature to score under, positive."""
    lora: LowRankAdapter | tuple[Tensor, Tensor, float] | None = None
    """Low-rank adapter on the weight."""
    process_group: Any = None
    """Reserved for a head whose vocabulary is split over ranks; anything but None is refused."""

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, and both factors of the adapter."""
        a, b, _ = self.lora or (None, None, 0.0)
        return self.weight, self.bias, a, b


class HeadInputs(NamedTuple):
    """What every forward takes, and its backward again."""

    hidden: Tensor
    """[T, D] in the compute dtype."""
    target: Tensor
    """int64 [T]: the token that a row predicts, V where the label was invalid."""
    rows: Tensor
    """int64 [R], ascending and contiguous: the scored rows."""
    head: LMHead
    """Its tensors are used in the compute dtype."""
    workspace_mib: int
    """See `KernelOptions`."""


class Needs(NamedTuple):
    """Which gradients a backward is to compute."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool


class HeadGrads(NamedTuple):
    """Gradients of the differentiable inputs, None where not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
