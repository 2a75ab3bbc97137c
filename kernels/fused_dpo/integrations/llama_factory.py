"""LLaMA-Factory's DPO trainer: its log-probs, and those of its reference, by the fused head."""

from functools import partialmethod
from typing import Any

import torch
from torch import Tensor

from fused_dpo.integrations.caller import Caller
from fused_dpo.integrations.pairs import desensitized, scored_mask, totals
from fused_dpo.integrations.patching import Patch, check_version
from fused_dpo.options import KernelOptions

_AVERAGED = ("ipo", "orpo", "simpo")
"""Losses that take the mean over tokens."""


def patch_llama_factory(
    packed: bool = True, *, grad_mode: str | None = None, options: KernelOptions | None = None
) -> Patch:
    """Let LLaMA-Factory's `CustomDPOTrainer` compute log-probs by fused_dpo, from here on or within a `with` block.

    One method of its class is replaced, so trainers that are built already follow too. It is for all its losses.

    Args:
        packed: lay the sequences of a batch into one row without padding, and compute once what they share; see
            `patch_trl` for what that asks of a model.
        grad_mode: see `fused_dpo_logps`.
        options: see `fused_dpo_logps`.

    Returns:
        What undoes it, and counts.

    Raises:
        ImportError: LLaMA-Factory is not installed.
        NotImplementedError: another version than 0.9.5.
        RuntimeError: it is patched already.
    """
    check_version("patch_llama_factory")
    from llamafactory.train.dpo.trainer import CustomDPOTrainer  # pyright: ignore[reportMissingImports]

    caller = Caller(packed=packed, grad_mode=grad_mode, options=options, with_means=True)
    method = partialmethod(concatenated_forward, caller=caller)
    return Patch("llama_factory", [(CustomDPOTrainer, "concatenated_forward", method)], caller.counts)


def concatenated_forward(
    trainer: Any, model: Any, batch: dict[str, Any], is_ref_model: bool = False, *, caller: Caller
) -> dict[str, Tensor]:
    """Compute what `CustomDPOTrainer.concatenated_forward` of 0.9.5 does, without the logits.

    Args:
        trainer: its `loss_type`, `ld_alpha` and `accelerator` are read.
        model: policy or reference, with its wrappers.
        batch: `labels` [2B, S] and what the model is called with, chosen sequences first.
        is_ref_model: leaves `ld_alpha` out.
        caller: calls the model, and counts.

    Returns:
        chosen_logps, rejected_logps, chosen_logps_avg: [B], as theirs. chosen_logits, rejected_logits: [], the mean of
        the logits, of which the trainer reads the mean alone. It is over every slot of the batch as theirs; of a packed
        batch over prompts and responses, as padding has no rows there; and NaN with a softcap on the logits.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")
    with trainer.accelerator.autocast():
        answer = caller(model, inputs, labels)
    logps = answer.tokens.logps
    scored = scored_mask(labels).to(logps.device)
    length = scored.sum(1)
    if trainer.ld_alpha is None or is_ref_model:
        sums = totals(logps)
    else:
        columns = torch.arange(logps.shape[1], device=logps.device)
        sums = desensitized(logps, length, columns - scored.int().argmax(1, keepdim=True), trainer.ld_alpha)
    averages = sums / length
    chosen, rejected = (averages if trainer.loss_type in _AVERAGED else sums).chunk(2)
    assert answer.mean_logits is not None
    chosen_logits, rejected_logits = answer.mean_logits
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_logits": chosen_logits,
        "rejected_logits": rejected_logits,
        "chosen_logps_avg": averages.chunk(2)[0],
    }
