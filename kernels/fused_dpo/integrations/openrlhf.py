"""OpenRLHF's DPO trainer: its log-probs, and those of its reference, by the fused head."""

from functools import partialmethod
from typing import Any

import torch
from torch import Tensor

from fused_dpo.integrations.caller import Caller, below_wrappers
from fused_dpo.integrations.patching import Patch, check_version
from fused_dpo.integrations.scoring import IGNORE_INDEX
from fused_dpo.options import KernelOptions


def patch_openrlhf(packed: bool = True, *, grad_mode: str | None = None, options: KernelOptions | None = None) -> Patch:
    """Let OpenRLHF's `DPOTrainer` compute log-probs by fused_dpo, from here on or within a `with` block.

    One method of its class is replaced, so trainers that are built already follow too. `Actor.forward`, which the
    trainers of reinforcement learning call, stays as it is.

    Args:
        packed: lay the sequences of a batch into one row without padding, and compute once what they share; see
            `patch_trl` for what that asks of a model. Takes the place of OpenRLHF's `packing_samples`.
        grad_mode: see `fused_dpo_logps`.
        options: see `fused_dpo_logps`.

    Returns:
        What undoes it, and counts.

    Raises:
        ImportError: OpenRLHF is not installed.
        NotImplementedError: another version than 0.11.
        RuntimeError: it is patched already.
    """
    check_version("patch_openrlhf")
    from openrlhf.trainer.dpo_trainer import DPOTrainer  # pyright: ignore[reportMissingImports]

    caller = Caller(packed=packed, grad_mode=grad_mode, options=options)
    method = partialmethod(concatenated_forward, caller=caller)
    return Patch("openrlhf", [(DPOTrainer, "concatenated_forward", method)], caller.counts)


def concatenated_forward(
    trainer: Any,
    model: Any,
    chosen_ids: Tensor,
    c_mask: Tensor,
    reject_ids: Tensor,
    r_mask: Tensor,
    prompt_id_lens: list[int],
    *,
    caller: Caller,
) -> tuple[Tensor, Tensor, Any, Tensor]:
    """Compute what `DPOTrainer.concatenated_forward` of 0.11 does with `Actor.forward`, without the logits.

    The DeepSpeed engine lies within the actor, as `model.model`: that is what is called, so that its hooks run.

    Args:
        trainer: its `concatenated_inputs`, `_get_batch_logps` and `strategy` are used.
        model: the actor, policy or reference.
        chosen_ids: int [B, S].
        c_mask: [B, S], 1 where there is a token.
        reject_ids: int [B, S'].
        r_mask: [B, S'].
        prompt_id_lens: tokens of each prompt.
        caller: calls the model, and counts.

    Returns:
        Log-probs of chosen and rejected [B]; the load-balancing loss, an empty list for none; the mean over the chosen
        ones of their mean negative log-prob.

    Raises:
        NotImplementedError: sequences (`ring_attn_size`) or weights (`ds_tensor_parallel_size`) are split over ranks.
    """
    strategy = trainer.strategy
    for name, on in {
        "ring attention (ring_attn_size)": strategy.ring_attn_group is not None,
        "tensor parallelism (ds_tensor_parallel_size)": getattr(strategy, "ds_tensor_parallel_size", 1) > 1,
    }.items():
        if on:
            raise NotImplementedError(f"patch_openrlhf knows no {name}; set it to 1, or train without the patch.")
    ids, mask, lengths = trainer.concatenated_inputs(chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens)
    columns = torch.arange(ids.shape[1], device=ids.device)
    prompts = columns < torch.tensor(lengths, device=ids.device)[:, None]
    labels = ids.masked_fill((mask == 0) | prompts, IGNORE_INDEX)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if not getattr(model, "is_vlm", False):  # which count their positions themselves
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
    if getattr(below_wrappers(model.model).config, "output_router_logits", False):
        inputs["output_router_logits"] = True
    answer = caller(model.model, inputs, labels, temperature=model.temperature)
    sums, means = trainer._get_batch_logps(answer.tokens.logps[:, :-1], mask, lengths)
    pairs = len(chosen_ids)
    aux_loss = [] if answer.aux_loss is None else answer.aux_loss
    return sums[:pairs], sums[pairs:], aux_loss, -means[:pairs].mean()
