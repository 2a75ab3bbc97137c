"""DPO of torchtune 0.6, which is no longer developed, with fused log-probs: what the class of a LoRA recipe needs.

class Recipe(LoRADPORecipeSingleDevice):
    concatenated_forward = concatenated_forward
"""

from torch import nn

from fused_dpo import LMHead, fused_token_logps
from fused_dpo.integrations import mean_logits


def concatenated_forward(recipe, model, batch):
    """Score ids and labels [2B, S]: log-probs of chosen and rejected [B], and the means of their logits []."""
    ids, asked = batch[0].to(recipe._device), scoring_head(model)
    asked["labels"] = batch[1].to(recipe._device)
    with recipe.activations_handling_ctx:
        chosen, rejected = model(ids).sum(-1).chunk(2)
    asked["labels"] = None
    return chosen, rejected, *asked["means"]


def scoring_head(model):
    """Let `model.output` score when there are labels; names and hooks of its weights stay as they are."""
    own, asked = model.output, vars(model).setdefault("fused_dpo", {})
    if hasattr(own, "lora_a"):
        raise NotImplementedError("an adapter on the output layer is not read here: apply_lora_to_output=False.")
    if asked:
        return asked
    project = own.forward if isinstance(own, nn.Module) else own  # a TiedLinear is none, but holds the embedding

    def forward(hidden):
        if asked["labels"] is None:
            return project(hidden)
        head = LMHead(getattr(own, "tied_module", own).weight)  # pyright: ignore
        asked["means"] = [mean_logits(half, head) for half in hidden.chunk(2)]
        return fused_token_logps(hidden, head, asked["labels"]).logps

    setattr(*((own, "forward", forward) if isinstance(own, nn.Module) else (model, "output", forward)))
    return asked
