"""Preference losses: sequence log-probs in, losses out."""

from fused_dpo.losses.functions import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    discopop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    ipo_norm_loss,
    nca_pair_loss,
    orpo_loss,
    robust_loss,
    sigmoid_loss,
    sigmoid_norm_loss,
    simpo_loss,
    sppo_hard_loss,
)
from fused_dpo.losses.length import desensitized_weights
from fused_dpo.losses.module import DPOLoss, LossOutput
from fused_dpo.losses.pairs import PairLogps, check_label_smoothing
from fused_dpo.losses.table import (
    LOSS_TYPES,
    LOSSES,
    LossSpec,
    loss_spec,
    needs_reference,
)

__all__ = [
    "LOSSES",
    "LOSS_TYPES",
    "DPOLoss",
    "LossOutput",
    "LossSpec",
    "PairLogps",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_pair_loss",
    "check_label_smoothing",
    "desensitized_weights",
    "discopop_loss",
    "exo_pair_loss",
    "hinge_loss",
    "ipo_loss",
    "ipo_norm_loss",
    "loss_spec",
    "nca_pair_loss",
    "needs_reference",
    "orpo_loss",
    "robust_loss",
    "sigmoid_loss",
    "sigmoid_norm_loss",
    "simpo_loss",
    "sppo_hard_loss",
]
