"""`DPOLoss`: any loss of `fused_dpo.losses` as a module, with its SFT term, its metrics and exact accumulation."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_dpo.losses.pairs import PairLogps, check_label_smoothing
from fused_dpo.losses.table import LOSSES, loss_spec

_DEFAULTS = {"label_smoothing": 0.0, "simpo_gamma": 0.5, "dpop_lambda": 50.0, "odpo_alpha": 0.0}
"""What a loss may take beyond pairs and beta, as it is where nobody sets it."""


class LossOutput(NamedTuple):
    """What `DPOLoss` returns. `loss` carries the gradient, everything else is detached."""

    loss: Tensor
    """Scalar to call backward on."""
    losses: Tensor
    """[B], without the SFT term."""
    metrics: dict[str, Tensor]
    """fp32 scalars on the device, under TRL's names."""
    chosen_rewards: Tensor
    """[B]: beta * logratios, or beta * mean log-prob for reference-free losses."""
    rejected_rewards: Tensor


class DPOLoss(torch.nn.Module):
    """A preference loss, with an SFT term if wanted, exact under gradient accumulation.

    `loss = losses.sum() / num_pairs + sft_weight * -chosen_logps.sum() / num_chosen_tokens`

    Micro-batches add up to the whole batch when each call gets the counts of the whole optimizer step. Three losses
    look across pairs and so depend on the micro-batching itself: `aot` and `aot_unpaired` sort within the batch they
    get, and `bco_pair` shifts rewards by their running mean, to which a call in train mode with gradients on first adds
    its own batch. That mean is state, per process: the buffers `reward_shift` and `reward_count`, in `state_dict()`.
    `plackett_luce` adds up as long as each ranking's pairs are in one call.

    Args:
        beta: > 0, applied to log-ratios once; larger keeps the policy closer to the reference.
        label_smoothing: probability in [0, 0.5) that a label is flipped; refused by losses that have no use for it.
            `exo_pair` cannot do without and makes 1e-3 of 0, as `.label_smoothing` then says.
        loss_type: a key of `LOSSES`.
        sft_weight: >= 0, weight of the chosen responses' mean token NLL.
        simpo_gamma: >= 0, SimPO's target margin; refused by other losses.
        dpop_lambda: >= 0, weight of DPO-Positive's penalty, 50 as in its paper; refused by other losses.
        odpo_alpha: >= 0, weight of the pairs' margins in the sigmoid loss (ODPO), 0 for none; refused by other losses.

    Raises:
        ValueError: an argument is out of range, or set although the loss does not use it.
    """

    reward_shift: Tensor
    reward_count: Tensor

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        loss_type: str = "sigmoid",
        *,
        sft_weight: float = 0.0,
        simpo_gamma: float = 0.5,
        dpop_lambda: float = 50.0,
        odpo_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        self.spec = loss_spec(loss_type)
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be > 0 and finite, got {beta}; 0.1 is usual")
        numbers = {"simpo_gamma": simpo_gamma, "dpop_lambda": dpop_lambda, "odpo_alpha": odpo_alpha}
        for name, value in {"sft_weight": sft_weight, **numbers}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        check_label_smoothing(label_smoothing)
        for name, value in {"label_smoothing": label_smoothing, **numbers}.items():
            default = _DEFAULTS[name]
            if value != default and name not in self.spec.options:
                users = ", ".join(key for key, spec in LOSSES.items() if name in spec.options)
                raise ValueError(
                    f"{name} must be left at {default} for loss_type {loss_type!r}, which does not use it, "
                    f"got {value}; it is used by {users}"
                )
        if loss_type == "exo_pair" and label_smoothing == 0:
            label_smoothing = 1e-3
        self.beta, self.label_smoothing, self.loss_type = beta, label_smoothing, loss_type
        self.sft_weight, self.simpo_gamma = sft_weight, simpo_gamma
        self.dpop_lambda, self.odpo_alpha = dpop_lambda, odpo_alpha
        if "reward_shift" in self.spec.options:
            self.register_buffer("reward_shift", torch.zeros(()))
            self.register_buffer("reward_count", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        margins: Tensor | None = None,
        rankings: Tensor | None = None,
        num_pairs: float | Tensor | None = None,
        num_chosen_tokens: float | Tensor | None = None,
    ) -> LossOutput:
        """Compute the loss of a (micro-)batch of B pairs, without a host sync; B = 0 gives an attached zero.

        Args:
            chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`, see `PairLogps`. Reference-free
                losses do not look at references; nothing checks that references are finite.
            chosen_lengths, rejected_lengths: `[B]` scored tokens, for length-normalised losses and the SFT term.
            margins, rankings: `[B]`, see `PairLogps`: for the sigmoid loss with `odpo_alpha`, and for `plackett_luce`.
            num_pairs: > 0, pairs in the whole optimizer step; B if None.
            num_chosen_tokens: > 0, scored chosen tokens in the whole step; `chosen_lengths.sum()` if None.

        Returns:
            LossOutput. Its metrics are means over this batch, but for `nll_loss` (with `sft_weight > 0` only): the SFT
            term as it enters the loss, before the weight, so that micro-batches' values add up to the step's.
        """
        pairs = PairLogps(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_lengths,
            rejected_lengths,
            margins,
            rankings,
        )
        with torch.no_grad():
            scores = (pairs.chosen_logratios, pairs.rejected_logratios) if self.spec.reference else pairs.mean_logps
            chosen_rewards, rejected_rewards = (self.beta * score for score in scores)
        if "reward_shift" in self.spec.options and self.training and torch.is_grad_enabled():
            self._observe(torch.cat((chosen_rewards, rejected_rewards)))
        options = {name: getattr(self, name) for name in self.spec.options}
        losses = self.spec.function(pairs, self.beta, **options)

        B = max(len(chosen_logps), 1)
        loss = losses.sum() / _count("num_pairs", B if num_pairs is None else num_pairs)
        per_pair = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": chosen_rewards > rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen_logps.detach(),
            "logps/rejected": rejected_logps.detach(),
        }
        metrics = {name: (values.sum() / B).float() for name, values in per_pair.items()}
        if self.sft_weight > 0:
            if num_chosen_tokens is None:
                num_chosen_tokens = pairs.require("chosen_lengths").sum().clamp(min=1)
            nll_loss = -chosen_logps.sum() / _count("num_chosen_tokens", num_chosen_tokens)
            loss = loss + self.sft_weight * nll_loss
            metrics["nll_loss"] = nll_loss.detach().float()
        return LossOutput(loss, losses.detach(), metrics, chosen_rewards, rejected_rewards)

    @torch.no_grad()
    def _observe(self, rewards: Tensor) -> None:
        """Take a batch of rewards into their running mean."""
        self.reward_count += rewards.numel()
        self.reward_shift += (rewards - self.reward_shift).sum() / self.reward_count.clamp(min=1)

    def extra_repr(self) -> str:
        """Show what was chosen in `print(loss)`."""
        names = ("loss_type", "beta", "label_smoothing", "sft_weight")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _count(name: str, count: float | Tensor) -> float | Tensor:
    # A tensor is trusted: looking at its value would wait for the device.
    if not isinstance(count, Tensor) and not count > 0:
        raise ValueError(f"{name} must be > 0, got {count}; leave it out to count this batch alone")
    return count
