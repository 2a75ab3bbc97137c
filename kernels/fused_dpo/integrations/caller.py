"""Calls the models of other people's trainers for log-probs, through whatever these have wrapped them in."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_dpo.api import TokenLogps
from fused_dpo.integrations.logit_means import logits_of_mean, mean_row
from fused_dpo.integrations.model_forward import SCORER, named, replace_forward
from fused_dpo.integrations.router_loss import load_balancing_loss
from fused_dpo.integrations.scoring import Counts, Scored, Scorer
from fused_dpo.models.adapters import unwrapped
from fused_dpo.models.parts import causal_model
from fused_dpo.options import KernelOptions


class Answer(NamedTuple):
    """What a model that a `Caller` has prepared answers."""

    tokens: TokenLogps
    """See `Scored`."""
    aux_loss: Tensor | None
    """Its load-balancing loss over the batch as it came, if `output_router_logits` was asked for."""
    mean_logits: Tensor | None
    """[2], the means of all logits of the first half of the batch and of the second, if asked for."""


class Caller:
    """Calls a trainer's policy and reference for log-probs.

    At its first call a model gets a forward that scores, below all wrappers; called without labels it is as it was.

    Args:
        packed: see `Scorer`.
        grad_mode: see `fused_dpo_logps`.
        options: see `fused_dpo_logps`.
        stats: see `fused_token_logps`.
        with_means: answer with the means of all logits.
    """

    def __init__(
        self,
        *,
        packed: bool = True,
        grad_mode: str | None = None,
        options: KernelOptions | None = None,
        stats: Collection[str] = (),
        with_means: bool = False,
    ) -> None:
        self.counts = Counts()
        self.settings = {"packed": packed, "grad_mode": grad_mode, "options": options, "counts": self.counts}
        self.stats, self.with_means = stats, with_means

    def __call__(self, model: Any, inputs: dict[str, Any], labels: Tensor, *, temperature: float = 1.0) -> Answer:
        """Call a model, wrapped as it is.

        Args:
            model: the trainer's, with its wrappers.
            inputs: what the trainer would call it with, without the labels.
            labels: int [N, S], not shifted, or [1, T] of sequences in one row.
            temperature: what the logits are divided by.

        Raises:
            NotImplementedError: a hook on the model does not let the labels through, or it has no load-balancing loss.
            RuntimeError: the model scores for somebody else already.
        """
        scorer = self._prepared(below_wrappers(model))
        scorer.temperature = temperature
        answer = model(**inputs, fused_dpo_labels=labels)
        if not isinstance(answer, Answer):
            raise NotImplementedError(
                f"{type(model).__name__} answers a call for log-probs with {type(answer).__name__}: a hook on it drops "
                f"arguments that it does not know, as those of multimodal templates do; train it without the patch."
            )
        return answer

    def _prepared(self, model: Any) -> "_CallersScorer":
        scorer = vars(model).get(SCORER)
        if isinstance(scorer, _CallersScorer) and scorer.caller is self:
            return scorer
        new = _CallersScorer(self)
        if isinstance(scorer, _CallersScorer):  # of a patch before, or of the model that this one is a copy of
            new.prepare(model)
            setattr(model, SCORER, new)
        else:
            replace_forward(model, new, _forward)
        return new


class _CallersScorer(Scorer):
    """A scorer that the next caller may take the place of: the forward looks it up in the model."""

    def __init__(self, caller: Caller) -> None:
        super().__init__(**caller.settings)
        self.caller = caller

    def answer(self, model: Any, inputs: dict[str, Any], labels: Tensor) -> Answer:
        """Score, and compute within the forward what needs the weights, which may be gathered only there."""
        scored = self.score(model, inputs, labels, with_stats=self.caller.stats)
        mask = inputs.get("attention_mask")
        aux_loss = load_balancing_loss(model, scored, mask) if inputs.get("output_router_logits") else None
        means = self._mean_logits(model, scored, mask) if self.caller.with_means else None
        return Answer(scored.tokens, aux_loss, means)

    def _mean_logits(self, model: Any, scored: Scored, mask: Tensor | None) -> Tensor:
        """Take the mean logits of both halves."""
        means = _mean_rows(scored, mask)
        # The call wants hidden states, which a hook may cast: the means stay out of it, in float64.
        return self.with_head(model, lambda head, _: logits_of_mean(means, head), scored.hidden[:1].detach())


def _forward(model: Any, original: Callable[..., Any], *args: Any, fused_dpo_labels: Any = None, **kwargs: Any) -> Any:
    if fused_dpo_labels is None:
        return original(*args, **kwargs)
    return vars(model)[SCORER].answer(model, named(model, args, kwargs), fused_dpo_labels)


def below_wrappers(model: Any) -> Any:
    """Find the model of transformers below peft, `torch.compile`, DDP, FSDP and DeepSpeed's engine."""
    model = unwrapped(model)
    # Of the class, as DeepSpeed's engine has every attribute of its model.
    while not hasattr(type(model), "get_output_embeddings") and "module" in getattr(model, "_modules", {}):
        model = unwrapped(model._modules["module"])
    return causal_model(model)


def _mean_rows(scored: Scored, mask: Tensor | None) -> Tensor:
    """Take the mean hidden states of both halves: of all slots, or, packed, of those that have a row."""
    hidden, rows = scored.hidden, scored.row_of_slot
    if rows is None:
        return torch.stack([mean_row(half) for half in hidden.chunk(2)])
    kept = torch.ones_like(rows) if mask is None else (mask.flatten() != 0).to(rows.dtype)
    halves = zip(rows.chunk(2), kept.chunk(2), strict=True)
    return torch.stack([mean_row(hidden, rows.new_zeros(len(hidden)).index_add(0, *half)) for half in halves])
