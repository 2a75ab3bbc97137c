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
    """Group of ranks that hold the vocabulary between them (a `torch.distributed.ProcessGroup`): `weight`, `bias` and
    the adapter's `b` are this rank's rows, those of rank i before those of rank i + 1. Hidden states, labels and the
    adapter's `a` have to be the same on all of them, and so have the gradients of the log-probs. The weight may be a
    DTensor that is `Shard(0)` over the group. None: the head is whole."""
    vocab_size: int | None = None
    """With `process_group` the rows V of all ranks, if these hold parts as `torch.chunk` and DTensors cut them; None:
    all hold as many."""

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, and both factors of the adapter."""
        a, b, _ = self.lora or (None, None, 0.0)
        return self.weight, self.bias, a, b


class VocabShard(NamedTuple):
    """Which part of the vocabulary a rank holds."""

    first: int
    """Token of the first row."""
    size: int
    """Rows of all ranks, V."""
    most: int
    """Rows of the rank that has most."""
    group: str
    """Name of the ranks' group, as torch names it."""


class HeadInputs(NamedTuple):
    """What every forward takes, and its backward again. V is the rows of the head that are here."""

    hidden: Tensor
    """[T, D] in the compute dtype."""
    target: Tensor
    """int64 [T]: the token that a row predicts, V where the label was invalid, or lies on another rank."""
    rows: Tensor
    """int64 [R], ascending and contiguous: the scored rows."""
    head: LMHead
    """Its tensors are used in the compute dtype."""
    workspace_mib: int
    """See `KernelOptions`."""
    shard: VocabShard | None = None
    """Where the head lies in the vocabulary, if this is split over ranks."""


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
