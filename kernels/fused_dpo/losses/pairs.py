"""What a loss may look at: log-probs, lengths, margins and rankings of preference pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PairLogps:
    """What a loss may look at: log-probs, lengths, margins and rankings of B preference pairs, one value per pair.

    Raises:
        ValueError: a shape is not `[B]`, or a loss asks for a field that is None.
        TypeError: log-probs in a dtype too coarse for a small difference of large sums.
    """

    chosen: Tensor
    """[B] fp32 or float64: policy log-probs of the chosen sequences."""
    rejected: Tensor
    ref_chosen: Tensor | None = None
    """[B]: the reference's log-probs; None is enough for reference-free losses."""
    ref_rejected: Tensor | None = None
    chosen_lengths: Tensor | None = None
    """[B], int or float: scored tokens; only length-normalised losses and the SFT term ask for them."""
    rejected_lengths: Tensor | None = None
    margins: Tensor | None = None
    """[B] fp32 or float64, >= 0: by how much chosen scored better than rejected; 0 where nobody scored them."""
    rankings: Tensor | None = None
    """[B] integers: pairs with the same number have the same chosen response, the best of a ranking, and rejected ones
    that `margins` rank. None: every pair is a ranking of two."""

    def __post_init__(self) -> None:
        shape = list(self.chosen.shape)
        if len(shape) != 1:
            raise ValueError(f"chosen must have shape [B], got {shape}; sum the token log-probs of each sequence first")
        for name, value in vars(self).items():
            if value is None:
                continue
            if list(value.shape) != shape:
                raise ValueError(
                    f"{name} must have shape [B] = {shape} to match chosen, got {list(value.shape)}; "
                    "pass one value per pair, chosen and rejected apart"
                )
            if name == "rankings":
                if value.is_floating_point():
                    raise TypeError(f"rankings must be integers, got {value.dtype}; number the ranked rows")
            elif not name.endswith("lengths") and value.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{name} must be float32 or float64, got {value.dtype}; a margin is a small difference of large "
                    "numbers, so sum the token log-probs in float32"
                )

    def require(self, name: str) -> Tensor:
        """Return the field `name`, or raise a ValueError that says what is missing and how to go on."""
        value = getattr(self, name)
        if value is None:
            way_out = "pass the reference's log-probs of both sides, or take a reference-free loss (simpo, orpo)"
            if name.endswith("lengths"):
                way_out = "pass the number of scored tokens of each sequence"
            if name == "margins":
                way_out = "pass the difference of the scores of each pair, 0 where there are none"
            raise ValueError(f"{name} is None, but this loss needs it; {way_out}")
        return value

    @property
    def chosen_logratios(self) -> Tensor:
        """`chosen - ref_chosen`."""
        return self.chosen - self.require("ref_chosen")

    @property
    def rejected_logratios(self) -> Tensor:
        """`rejected - ref_rejected`."""
        return self.rejected - self.require("ref_rejected")

    @property
    def delta(self) -> Tensor:
        """`chosen_logratios - rejected_logratios`: what beta multiplies in DPO."""
        return self.chosen_logratios - self.rejected_logratios

    @property
    def norm_delta(self) -> Tensor:
        """`delta` with each logratio divided by its own sequence's length."""
        chosen, rejected = self._per_token(self.chosen_logratios, self.rejected_logratios)
        return chosen - rejected

    @property
    def mean_logps(self) -> tuple[Tensor, Tensor]:
        """Mean policy log-prob per token, chosen and rejected."""
        return self._per_token(self.chosen, self.rejected)

    def _per_token(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        # A sequence without scored tokens has the sum 0, and so the mean 0.
        chosen_lengths, rejected_lengths = self.require("chosen_lengths"), self.require("rejected_lengths")
        return chosen / chosen_lengths.clamp(min=1), rejected / rejected_lengths.clamp(min=1)


def check_label_smoothing(label_smoothing: float) -> None:
    """Refuse what is not the probability of a flipped label."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), got {label_smoothing}; it is the probability that a label is "
            "flipped, and at 0.5 labels say nothing"
        )
