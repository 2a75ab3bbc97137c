"""ms-swift's DPO trainer: its log-probs, and those of its reference, by the fused head."""

from functools import partialmethod
from typing import Any

from torch import Tensor

from fused_dpo.integrations.caller import Caller
from fused_dpo.integrations.pairs import desensitized, mean_of, scored_mask, totals
from fused_dpo.integrations.patching import Patch, check_version
from fused_dpo.options import KernelOptions


def patch_ms_swift(packed: bool = True, *, grad_mode: str | None = None, options: KernelOptions | None = None) -> Patch:
    """Let ms-swift's `DPOTrainer` compute log-probs by fused_dpo, from here on or within a `with` block.

    One method of its class is replaced, so trainers that are built already follow too. It is for all its losses.

    Args:
        packed: lay the sequences of a batch into one row without padding, and compute once what they share; see
            `patch_trl` for what that asks of a model. Rows that ms-swift has packed (`padding_free`, `packing`) are
            packed anew.
        grad_mode: see `fused_dpo_logps`.
        options: see `fused_dpo_logps`.

    Returns:
        What undoes it, and counts.

    Raises:
        ImportError: ms-swift is not installed.
        NotImplementedError: another version than 4.6.
        RuntimeError: it is patched already.
    """
    check_version("patch_ms_swift")
    from swift.rlhf_trainers.dpo_trainer import DPOTrainer  # pyright: ignore[reportMissingImports]

    caller = Caller(packed=packed, grad_mode=grad_mode, options=options, stats=("mean_logit",))
    method = partialmethod(concatenated_forward, caller=caller)
    return Patch("ms_swift", [(DPOTrainer, "concatenated_forward", method)], caller.counts)


def concatenated_forward(
    trainer: Any, model: Any, batch: dict[str, Any], is_ref_model: bool = False, *, caller: Caller
) -> dict[str, Tensor]:
    """Compute what `DPOTrainer.concatenated_forward` of 4.6 does, without the logits.

    `logits_to_keep` has nothing to save here, as the head sees scored rows alone, and is not used.

    Args:
        trainer: its `template`, `args.ld_alpha`, `aux_loss_enabled`, `is_encoder_decoder` and `accelerator` are read.
        model: policy or reference, with its wrappers.
        batch: `labels` and what the model is called with, chosen sequences first: [2B, S], or in one row [1, T] with
            `position_ids` that begin anew.
        is_ref_model: leaves `ld_alpha` and the likelihood of the chosen ones out.
        caller: calls the model, and counts.

    Returns:
        chosen_logps, rejected_logps, chosen_completion_token_counts, rejected_completion_token_counts: [B];
        mean_chosen_logits, mean_rejected_logits, over scored rows; nll_loss; aux_loss: [].

    Raises:
        NotImplementedError: sequence parallelism, or an encoder-decoder.
    """
    if trainer.template.sequence_parallel_size > 1:
        raise NotImplementedError(
            f"patch_ms_swift does not score sequences that are split over ranks (sequence_parallel_size="
            f"{trainer.template.sequence_parallel_size}); set it to 1, or train without the patch."
        )
    if trainer.is_encoder_decoder:
        raise NotImplementedError("patch_ms_swift scores causal models, not encoder-decoders; train without the patch.")
    inputs = dict(batch)
    labels = inputs.pop("labels")
    positions = inputs.pop("text_position_ids", None)
    positions = inputs.get("position_ids") if positions is None else positions
    if trainer.aux_loss_enabled:
        inputs["output_router_logits"] = True
    with trainer.accelerator.autocast():
        answer = caller(model, inputs, labels)
    logps, mean_logit = answer.tokens.logps, answer.tokens.mean_logit
    assert mean_logit is not None
    if trainer.template.padding_free:
        assert positions is not None
        labels, logps, mean_logit = (
            _a_row_each(values, positions, fill) for values, fill in ((labels, -100), (logps, 0), (mean_logit, 0))
        )
    scored = scored_mask(labels).to(logps.device)
    counts = scored.sum(1)
    if trainer.args.ld_alpha is None or is_ref_model:
        sums = totals(logps)
    else:
        sums = desensitized(logps, counts, scored.cumsum(1) - 1, trainer.args.ld_alpha)
    pairs = len(sums) // 2
    output = {
        "chosen_logps": sums[:pairs],
        "rejected_logps": sums[pairs:],
        "mean_chosen_logits": mean_of(mean_logit[:pairs], scored[:pairs]),
        "mean_rejected_logits": mean_of(mean_logit[pairs:], scored[pairs:]),
        "chosen_completion_token_counts": counts[:pairs],
        "rejected_completion_token_counts": counts[pairs:],
    }
    if not is_ref_model:
        output["nll_loss"] = -mean_of(logps[:pairs], scored[:pairs])
    if answer.aux_loss is not None:
        output["aux_loss"] = answer.aux_loss
    return output


def _a_row_each(values: Tensor, positions: Tensor, fill: int) -> Tensor:
    """Lay the sequences of one row [1, T] below each other, [N, S], by positions [1, T] that begin anew with each."""
    at = positions[0].to(values.device)
    sequence = (at == 0).cumsum(0) - 1
    padded = values.new_full((int(sequence[-1]) + 1, int(at.max()) + 1), fill)
    return padded.index_put((sequence, at), values[0])
