"""TRL's DPOTrainer from 0.20 to 0.28, which takes everything from `concatenated_forward`, by the fused head."""

from functools import partialmethod
from typing import Any

import torch
from torch import Tensor

from fused_dpo.integrations.caller import Caller
from fused_dpo.integrations.pairs import desensitized, mean_of, scored_mask, totals
from fused_dpo.integrations.patching import Patch, check_version
from fused_dpo.integrations.scoring import IGNORE_INDEX
from fused_dpo.options import KernelOptions

_IMAGES = ("pixel_values", "pixel_attention_mask", "image_sizes", "token_type_ids")


def patch_legacy(
    version: str, *, packed: bool = True, grad_mode: str | None = None, options: KernelOptions | None = None
) -> Patch:
    """Replace `DPOTrainer.concatenated_forward`: see `patch_trl`, which calls this for TRL up to 0.28.

    The method of the class is replaced, so trainers that are built already follow too.

    Raises:
        NotImplementedError: another version.
        RuntimeError: it is patched already.
    """
    check_version("patch_trl", version)
    from trl.trainer.dpo_trainer import DPOTrainer  # pyright: ignore[reportMissingImports]

    caller = Caller(packed=packed, grad_mode=grad_mode, options=options, stats=("mean_logit",))
    method = partialmethod(concatenated_forward, caller=caller)
    return Patch("trl", [(DPOTrainer, "concatenated_forward", method)], caller.counts)


def concatenated_forward(
    trainer: Any, model: Any, batch: dict[str, Any], is_ref_model: bool = False, *, caller: Caller
) -> dict[str, Tensor]:
    """Compute what `DPOTrainer.concatenated_forward` of 0.20 to 0.28 does, without the logits.

    `padding_free` and `use_logits_to_keep` have nothing to save here: packed rows have no padding, and the head sees
    scored rows alone. What they change in the results of TRL is done too, or refused.

    Args:
        trainer: its settings, `concatenated_inputs` and `accelerator` are used.
        model: policy or reference, with its wrappers.
        batch: prompts [B, P] padded on the left, responses [B, C] padded on the right.
        is_ref_model: leaves `ld_alpha` out.
        caller: calls the model, and counts.

    Returns:
        chosen_logps, rejected_logps: [B]; mean_chosen_logits, mean_rejected_logits, over scored rows; nll_loss;
        aux_loss: [].

    Raises:
        NotImplementedError: images, encoder-decoders, `use_weighting`, or with `padding_free` a result that TRL mixes
            between sequences.
    """
    _refuse(trainer, batch)
    ids, mask, labels = _sequences(trainer, batch)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if trainer.aux_loss_enabled:
        inputs["output_router_logits"] = True
    with trainer.accelerator.autocast():
        answer = caller(model, inputs, labels)
    logps, mean_logit = answer.tokens.logps, answer.tokens.mean_logit
    assert mean_logit is not None
    labels = labels.to(logps.device)
    scored = scored_mask(labels)
    lengths = (labels != IGNORE_INDEX).sum(1)  # a response that is cut at both ends has a first token without a row
    pairs = len(ids) // 2
    sums = totals(logps)
    if "ipo" in trainer.loss_type:
        sums = sums / lengths
    if trainer.args.ld_alpha is not None and not is_ref_model:
        sums = _desensitized(trainer, logps, scored, lengths)
    output = {
        "chosen_logps": sums[:pairs],
        "rejected_logps": sums[pairs:],
        "mean_chosen_logits": mean_of(mean_logit[:pairs], scored[:pairs]),
        "mean_rejected_logits": mean_of(mean_logit[pairs:], scored[pairs:]),
    }
    if _wants_likelihood(trainer):
        # TRL leaves token 0 out of it, as it takes that for padding.
        counted = scored[:pairs] & (labels[:pairs].roll(-1, 1) != 0)
        output["nll_loss"] = -mean_of(logps[:pairs], counted)
    if answer.aux_loss is not None:
        output["aux_loss"] = answer.aux_loss
    return output


def _wants_likelihood(trainer: Any) -> bool:
    return getattr(trainer.args, "rpo_alpha", None) is not None or "sft" in trainer.loss_type


def _refuse(trainer: Any, batch: dict[str, Any]) -> None:
    """Refuse what is not computed here, by name."""
    reasons = {
        "encoder-decoders": trainer.is_encoder_decoder,
        "images": any(name in batch for name in _IMAGES),
        "use_weighting": trainer.use_weighting,
    }
    if trainer.padding_free:
        mixed = "with padding_free, where TRL mixes sequences in it"
        reasons[f"ipo {mixed}"] = "ipo" in trainer.loss_type
        reasons[f"ld_alpha {mixed}"] = trainer.args.ld_alpha is not None
        reasons[f"the likelihood of the chosen ones (rpo_alpha, sft) {mixed}"] = _wants_likelihood(trainer)
    for reason, applies in reasons.items():
        if applies:
            raise NotImplementedError(
                f"patch_trl does not know {reason} in TRL up to 0.28; pip install 'trl>=1.15', or train without it."
            )


def _sequences(trainer: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Lay prompts and responses behind each other, cut and moved to the left: ids, mask and labels [2B, S]."""
    parts = trainer.concatenated_inputs(batch, padding_value=0)
    prompt, response = parts["prompt_attention_mask"], parts["completion_attention_mask"]
    ids = torch.cat((parts["prompt_input_ids"], parts["completion_input_ids"]), dim=1)
    mask = torch.cat((prompt, response), dim=1).bool()
    labels = ids.masked_fill(torch.cat((torch.zeros_like(prompt), response), dim=1) == 0, IGNORE_INDEX)
    if trainer.max_length is not None and trainer.max_length < ids.shape[1]:
        from_end = {"keep_start": False, "keep_end": True}[trainer.truncation_mode]
        counted = mask.flip(1).cumsum(1).flip(1) if from_end else mask.cumsum(1)
        mask = mask & (counted <= trainer.max_length)
    order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    ids, mask, labels = (values.gather(1, order) for values in (ids, mask, labels))
    return ids, mask.to(prompt.dtype), labels.masked_fill(~mask, IGNORE_INDEX)


def _desensitized(trainer: Any, logps: Tensor, scored: Tensor, lengths: Tensor) -> Tensor:
    """Apply `ld_alpha` as TRL up to 0.28 does: it numbers tokens from the first that it has logits of.

    That is the beginning of the prompt, or with `use_logits_to_keep` of the batch's first response, and tokens from a
    sequence's own length on are not counted at all. What is not done is to count the first token of a response that
    fills the whole row, which TRL scores by the row's last logits.
    """
    first = int(scored.any(0).int().argmax()) if trainer.use_logits_to_keep else 0
    place = torch.arange(1, logps.shape[1] + 1, device=logps.device)[None] - first
    kept = torch.where(place < lengths[:, None], logps, 0.0)
    return desensitized(kept, lengths, place, trainer.args.ld_alpha)
