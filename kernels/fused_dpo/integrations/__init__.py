"""Other people's trainers; third parties and the engine are imported inside functions."""

from fused_dpo.integrations.llama_factory import patch_llama_factory
from fused_dpo.integrations.logit_means import mean_logits
from fused_dpo.integrations.model_forward import add_scoring, remove_scoring
from fused_dpo.integrations.ms_swift import patch_ms_swift
from fused_dpo.integrations.openrlhf import patch_openrlhf
from fused_dpo.integrations.patching import Patch
from fused_dpo.integrations.trl import patch_trl
from fused_dpo.integrations.wrapper import LogpsModel

__all__ = [
    "LogpsModel",
    "Patch",
    "add_scoring",
    "mean_logits",
    "patch_llama_factory",
    "patch_ms_swift",
    "patch_openrlhf",
    "patch_trl",
    "remove_scoring",
]
