"""Sequence log-probs and their gradients straight from hidden states and the lm_head, without the logits.

`fused_dpo_logps` is the drop-in; `DPOLoss` turns its numbers into a preference loss. Needs torch, and triton for the
CUDA kernels, nothing else; imports on a machine without a GPU.
"""

from fused_dpo.api import TokenLogps, fused_dpo_logps, fused_token_logps
from fused_dpo.full_logits import get_batch_logps
from fused_dpo.head import LMHead, LowRankAdapter
from fused_dpo.losses.module import DPOLoss, LossOutput
from fused_dpo.models.check import check_head
from fused_dpo.models.fused_head import FusedHead
from fused_dpo.models.head import head_of
from fused_dpo.models.parts import backbone_of
from fused_dpo.ops.sequence_sum import sequence_sum
from fused_dpo.options import KernelOptions
from fused_dpo.version import VERSION

__version__ = VERSION

__all__ = [
    "DPOLoss",
    "FusedHead",
    "KernelOptions",
    "LMHead",
    "LossOutput",
    "LowRankAdapter",
    "TokenLogps",
    "backbone_of",
    "check_head",
    "fused_dpo_logps",
    "fused_token_logps",
    "get_batch_logps",
    "head_of",
    "sequence_sum",
]
