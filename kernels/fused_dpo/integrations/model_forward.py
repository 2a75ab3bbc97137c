"""A Hugging Face causal language model that other trainers call for log-probs in the place of logits.

The trainer's own call of the model stays: whatever wraps the model (autocast, DDP, FSDP, DeepSpeed, peft) acts on it.
Below it stands the forward that is put into the model here.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from fused_dpo.integrations.scoring import Counts, Scorer
from fused_dpo.models.fused_head import FusedHead
from fused_dpo.models.parts import causal_model

SCORER = "fused_dpo_scorer"
"""Attribute of a model whose forward scores."""
Forward = Callable[..., Any]
"""(model, original, *args, **kwargs) -> what the model's forward returns; `original` is the forward it replaces."""


def replace_forward(model: Any, scorer: Scorer, forward: Forward) -> None:
    """Put another forward into a model, with the signature of its own, which `generate` and others look at.

    Raises:
        RuntimeError: it has one already.
        NotImplementedError, TypeError, ValueError: see `Scorer.prepare`.
    """
    if SCORER in vars(model):
        raise RuntimeError(
            f"this {type(model).__name__} computes log-probs by fused_dpo already; remove_scoring(model), or load "
            f"a model for each trainer."
        )
    scorer.prepare(model)
    scorer.before = vars(model).get("forward")

    @functools.wraps(type(model).forward)
    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Of the class, bound here: a copy of the model has to call its own.
        original = scorer.before or types.MethodType(type(self).forward, self)
        return forward(self, original, *args, **kwargs)

    scorer.replaced = replaced
    setattr(model, SCORER, scorer)
    model.forward = types.MethodType(replaced, model)


def named(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give the arguments of a model's forward their names, without those that are None, which peft passes on."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return {
        name: value for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items() if value is not None
    }


def add_scoring(model: Any, **settings: Any) -> Counts:
    """Let a model be called for log-probs: `model(..., fused_dpo_labels=labels)` returns a `Scored`.

    Called without these labels it is as it was. The call may be that of any wrapper which passes keywords on.
    `fused_dpo_stats` are the stats to compute, see `fused_token_logps`.

    Args:
        model: a causal language model of transformers, before or within peft: of a PeftModel its base gets it.
        settings: see `Scorer`.

    Returns:
        Where the calls are counted.

    Raises:
        RuntimeError: it has been done.
        NotImplementedError, TypeError: its head cannot be read.
        ValueError: packed, but its layers would let packed sequences see each other.
    """
    scorer = Scorer(**settings)

    def forward(self: Any, original: Forward, *args: Any, **kwargs: Any) -> Any:
        labels, stats = kwargs.pop("fused_dpo_labels", None), kwargs.pop("fused_dpo_stats", ())
        if labels is None:
            return original(*args, **kwargs)
        return scorer.score(self, named(self, args, kwargs), labels, with_stats=stats)

    replace_forward(causal_model(model), scorer, forward)
    return scorer.counts


def remove_scoring(model: Any) -> None:
    """Give a model its own forward back; its attention stays, which without a plan computes what SDPA does.

    Raises:
        RuntimeError: somebody has put a forward of theirs around ours since, as accelerate does; theirs would be lost.
    """
    model = causal_model(model)
    scorer = vars(model).get(SCORER)
    if scorer is None:
        return
    if getattr(vars(model).get("forward"), "__func__", None) is not scorer.replaced:
        raise RuntimeError(
            f"the forward of this {type(model).__name__} was replaced again after add_scoring; undo that first "
            f"(accelerator.unwrap_model(model, keep_fp32_wrapper=False) for accelerate's)."
        )
    FusedHead(model).remove()
    delattr(model, SCORER)
    del model.forward
    if scorer.before is not None:
        model.forward = scorer.before
