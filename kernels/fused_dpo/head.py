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


class HeadGrads(NamedTuple):
    """Gradients of the differentiable inputs, None where not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
