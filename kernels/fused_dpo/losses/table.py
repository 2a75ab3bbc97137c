"""The table of losses: name, function, and what each takes."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fused_dpo.losses.functions import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    discopop_loss,
    dpop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    ipo_norm_loss,
    nca_pair_loss,
    orpo_loss,
    plackett_luce_loss,
    robust_loss,
    sigmoid_loss,
    sigmoid_norm_loss,
    simpo_loss,
    sppo_hard_loss,
)


@dataclass(frozen=True)
class LossSpec:
    """A row of `LOSSES`."""

    function: Callable[..., Tensor]
    """`function(pairs, beta, **options) -> [B]`."""
    options: tuple[str, ...] = ()
    """What it takes beyond pairs and beta."""
    reference: bool = True
    """Whether it compares the policy with a reference."""
    across_pairs: bool = False
    """Whether it compares pairs with each other, so that it matters which are evaluated together."""
    ranked: bool = False
    """Whether it compares all answers of a ranking, so that its pairs must be evaluated together."""


LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(sigmoid_loss, ("label_smoothing", "odpo_alpha")),
    "hinge": LossSpec(hinge_loss),
    "ipo": LossSpec(ipo_loss),
    "ipo_norm": LossSpec(ipo_norm_loss),
    "robust": LossSpec(robust_loss, ("label_smoothing",)),
    "exo_pair": LossSpec(exo_pair_loss, ("label_smoothing",)),
    "nca_pair": LossSpec(nca_pair_loss),
    "bco_pair": LossSpec(bco_pair_loss, ("reward_shift",), across_pairs=True),
    "sppo_hard": LossSpec(sppo_hard_loss),
    "apo_zero": LossSpec(apo_zero_loss),
    "apo_down": LossSpec(apo_down_loss),
    "aot": LossSpec(aot_loss, ("label_smoothing",), across_pairs=True),
    "aot_unpaired": LossSpec(aot_unpaired_loss, ("label_smoothing",), across_pairs=True),
    "discopop": LossSpec(discopop_loss),
    "dpop": LossSpec(dpop_loss, ("dpop_lambda",)),
    "plackett_luce": LossSpec(plackett_luce_loss, ranked=True),
    "sigmoid_norm": LossSpec(sigmoid_norm_loss, ("label_smoothing",)),
    "simpo": LossSpec(simpo_loss, ("label_smoothing", "simpo_gamma"), reference=False),
    "orpo": LossSpec(orpo_loss, reference=False),
}
LOSS_TYPES: tuple[str, ...] = tuple(LOSSES)


def loss_spec(loss_type: str) -> LossSpec:
    """Look a loss up by name; ValueError with the valid names and the closest one if there is none."""
    if loss_type not in LOSSES:
        closest = difflib.get_close_matches(loss_type, LOSS_TYPES, n=1)
        hint = f"; did you mean {closest[0]!r}?" if closest else ""
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}{hint}")
    return LOSSES[loss_type]


def needs_reference(loss_type: str) -> bool:
    """Tell whether the loss compares the policy with a reference model."""
    return loss_spec(loss_type).reference
