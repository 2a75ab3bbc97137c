"""A policy made ready for several processes."""

from typing import Any

import torch

from fused_dpo import FusedHead
from fused_dpo_engine.distributed.ddp import Replicated
from fused_dpo_engine.distributed.fsdp2 import Sharded
from fused_dpo_engine.distributed.ranks import TENSOR, Ranks
from fused_dpo_engine.distributed.strategy import Split, Strategy
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.layers import decoder_layers, untied_ends
from fused_dpo_engine.model.policy import Policy
from fused_dpo_engine.model.tensor_parallel import split_model


def share_out(
    policy: Policy, strategy: str, ranks: Ranks, device: torch.device, *, offload: bool, reduces_every_pass: bool
) -> Strategy:
    """Let the processes hold a policy as one of the strategies of `choose_strategy` has it, and compute on a device.

    Every rank has loaded the whole model: with FSDP2, and if it is split, on the host, where it has to fit once a
    process of the machine.

    Raises:
        UserError: quantised weights, or a model whose layers are not known, with FSDP2; a model that cannot be split.
    """
    if ranks.tensor_parallel > 1:
        assert ranks.mesh is not None
        split_model(policy.causal_lm, ranks.mesh[TENSOR])
    if strategy == "one process":
        return Strategy(policy) if ranks.tensor_parallel == 1 else Split(policy)
    if strategy == "ddp":
        return Replicated(policy, ranks)
    if getattr(policy.causal_lm, "hf_quantizer", None) is not None:
        raise UserError("--strategy fsdp2, --offload: quantised weights are not cut into shares; take --strategy ddp.")
    policy.computes_on = device
    half = policy.compute_dtype if policy.compute_dtype.itemsize == 2 else None
    policy.head = FusedHead(policy.causal_lm)  # by rows that are not cut into shares yet, if the model is split
    return Sharded(
        policy,
        decoder_layers(policy.causal_lm),
        untied_ends(policy.causal_lm),
        ranks,
        half,
        offload=offload,
        reduces_every_pass=reduces_every_pass,
    )


def weights_to_save(strategy: Strategy, policy: Policy) -> dict[str, Any] | None:
    """Gather what `save_pretrained` is to write, on all ranks; None where the model holds it itself.

    peft writes the weights below adapters on embeddings or head too.
    """
    model = policy.causal_lm
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    adapted = any(hasattr(layer, "base_layer") for layer in ends)
    return strategy.whole_weights(policy.model, trained_alone=policy.model is not model and not adapted)
