"""The one copy of preference-loss mathematics: sequence log-probs in, per-pair losses out.

`DPOLoss` is the front door, `LOSSES` the table of what it computes. Tensors are `[B]`, fp32 or float64. In equations
`chosen` and `rejected` are the policy's sequence log-probs, a `logratio` is policy minus reference, and `delta` is the
chosen logratio minus the rejected one.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class PairLogps:
    """What a loss may look at: log-probs and lengths of B preference pairs, one value per pair.

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
            if not name.endswith("lengths") and value.dtype not in (torch.float32, torch.float64):
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


def _logistic(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of "chosen wins", at log-odds `margins`, when the label is flipped with that probability."""
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def sigmoid_loss(pairs: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO; with label smoothing, conservative DPO.

    `-(1 - eps) * logsigmoid(beta * delta) - eps * logsigmoid(-beta * delta)`
    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; eps: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    return _logistic(beta * pairs.delta, label_smoothing)


def sigmoid_norm_loss(pairs: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Length-normalised DPO. Its beta is larger (Tulu 3: 5), as means are smaller than sums.

    `-logsigmoid(beta * (chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths))`
    Source: Lambert et al. 2024, "Tulu 3", arXiv:2411.15124.
    """
    return _logistic(beta * pairs.norm_delta, label_smoothing)


def simpo_loss(pairs: PairLogps, beta: float, label_smoothing: float = 0.0, simpo_gamma: float = 0.5) -> Tensor:
    """SimPO: reference-free, on mean log-probs; the target margin gamma is on the scale of rewards, after beta.

    `-logsigmoid(beta * (chosen / chosen_lengths - rejected / rejected_lengths) - gamma)`
    Source: Meng, Xia and Chen 2024, arXiv:2405.14734.
    """
    chosen, rejected = pairs.mean_logps
    return _logistic(beta * (chosen - rejected) - simpo_gamma, label_smoothing)


def hinge_loss(pairs: PairLogps, beta: float) -> Tensor:
    """SLiC's hinge on DPO's margin, as normalised by RSO.

    `relu(1 - beta * delta)`
    Source: Zhao et al. 2023, "SLiC-HF", arXiv:2305.10425; Liu et al. 2023, "RSO", arXiv:2309.06657.
    """
    return F.relu(1 - beta * pairs.delta)


def ipo_loss(pairs: PairLogps, beta: float) -> Tensor:
    """IPO on sums over the sequence, as in the paper, whose tau is beta.

    `(delta - 1 / (2 * beta)) ** 2`
    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    """
    return (pairs.delta - 0.5 / beta).square()


def ipo_norm_loss(pairs: PairLogps, beta: float) -> Tensor:
    """IPO on means over the sequence: TRL's `ipo`.

    `(chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths - 1 / (2 * beta)) ** 2`
    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17, averaged per token as TRL's DPOTrainer does.
    """
    return (pairs.norm_delta - 0.5 / beta).square()


def robust_loss(pairs: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO: an unbiased estimate of the clean loss when labels flip with probability eps. Unbounded below.

    `(-(1 - eps) * logsigmoid(beta * delta) + eps * logsigmoid(-beta * delta)) / (1 - 2 * eps)`
    Source: Ray Chowdhury, Kini and Natarajan 2024, "Provably Robust DPO", arXiv:2403.00409.
    """
    check_label_smoothing(label_smoothing)
    margins = beta * pairs.delta
    as_given, flipped = _logistic(margins), _logistic(-margins)
    return ((1 - label_smoothing) * as_given - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_pair_loss(pairs: PairLogps, beta: float, label_smoothing: float = 1e-3) -> Tensor:
    """EXO on pairs: reverse KL from the policy's preference p to the smoothed label (1 - eps, eps), eps > 0.

    `p = sigmoid(beta * delta); p * (log(p) - log(1 - eps)) + (1 - p) * (log(1 - p) - log(eps))`
    Source: Ji et al. 2024, arXiv:2402.00856, Eq. 16.
    """
    check_label_smoothing(label_smoothing)
    if label_smoothing == 0:
        raise ValueError("label_smoothing must be > 0 for exo_pair, whose loss contains its log, got 0; 1e-3 is usual")
    margins = beta * pairs.delta
    chosen_wins = torch.sigmoid(margins) * (F.logsigmoid(margins) - math.log1p(-label_smoothing))
    return chosen_wins + torch.sigmoid(-margins) * (F.logsigmoid(-margins) - math.log(label_smoothing))


def nca_pair_loss(pairs: PairLogps, beta: float) -> Tensor:
    """NCA on pairs: contrast with noise, which also keeps the chosen likelihood from falling.

    `c, r = beta * logratios; -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r)`
    Source: Chen et al. 2024, "Noise Contrastive Alignment", arXiv:2402.05369.
    """
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return _logistic(chosen) + 0.5 * (_logistic(-chosen) + _logistic(-rejected))


def bco_pair_loss(pairs: PairLogps, beta: float, reward_shift: Tensor | float = 0.0) -> Tensor:
    """BCO on pairs: classify rewards as above or below the shift, the mean reward so far; recent TRL has it at 0.

    `-logsigmoid(beta * chosen_logratios - shift) - logsigmoid(-(beta * rejected_logratios - shift))`
    Source: Jung et al. 2024, "Binary Classifier Optimization", arXiv:2404.04656.
    """
    return _logistic(beta * pairs.chosen_logratios - reward_shift) + _logistic(
        reward_shift - beta * pairs.rejected_logratios
    )


def sppo_hard_loss(pairs: PairLogps, beta: float) -> Tensor:
    """SPPO with hard win probabilities: 1 for chosen, 0 for rejected.

    `(chosen_logratios - 0.5 / beta) ** 2 + (rejected_logratios + 0.5 / beta) ** 2`
    Source: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7.
    """
    return (pairs.chosen_logratios - 0.5 / beta).square() + (pairs.rejected_logratios + 0.5 / beta).square()


def apo_zero_loss(pairs: PairLogps, beta: float) -> Tensor:
    """APO-zero: raise chosen, lower rejected. For chosen responses better than the model's own.

    `(1 - sigmoid(beta * chosen_logratios)) + sigmoid(beta * rejected_logratios)`
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7.
    """
    return torch.sigmoid(-beta * pairs.chosen_logratios) + torch.sigmoid(beta * pairs.rejected_logratios)


def apo_down_loss(pairs: PairLogps, beta: float) -> Tensor:
    """APO-down: lower both, rejected more. For chosen responses worse than the model's own.

    `sigmoid(beta * chosen_logratios) + (1 - sigmoid(beta * delta))`
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8.
    """
    return torch.sigmoid(beta * pairs.chosen_logratios) + torch.sigmoid(-beta * pairs.delta)


def aot_loss(pairs: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT, paired: the policy's margins against the reference's, rank by rank. Entry i belongs to rank i, not pair i.

    `d = sort(chosen - rejected) - sort(ref_chosen - ref_rejected); -logsigmoid(beta * d)`
    Source: Melnyk et al. 2024, "Distributional Preference Alignment via Optimal Transport", arXiv:2406.05882.
    """
    margins = pairs.chosen - pairs.rejected
    ref_margins = pairs.require("ref_chosen") - pairs.require("ref_rejected")
    return _logistic(beta * (margins.sort().values - ref_margins.sort().values), label_smoothing)


def aot_unpaired_loss(pairs: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT, unpaired (`aot_pair` in older TRL): chosen against rejected logratios, rank by rank, as in `aot_loss`.

    `d = sort(chosen_logratios) - sort(rejected_logratios); -logsigmoid(beta * d)`
    Source: Melnyk et al. 2024, arXiv:2406.05882.
    """
    d = pairs.chosen_logratios.sort().values - pairs.rejected_logratios.sort().values
    return _logistic(beta * d, label_smoothing)


def discopop_loss(pairs: PairLogps, beta: float, tau: float = 0.05) -> Tensor:
    """DiscoPOP's discovered, log-ratio modulated loss: logistic for negative margins, exponential for positive ones.

    `x = beta * delta; m = sigmoid(x / tau); (1 - m) * -logsigmoid(x) + m * exp(-x)`
    Source: Lu et al. 2024, arXiv:2406.08414, Eq. 5.
    """
    margins = beta * pairs.delta
    # m * exp(-x) as one exponential: the factors alone are 0 and inf where x is very negative.
    exponential = torch.exp(F.logsigmoid(margins / tau) - margins)
    return torch.sigmoid(-margins / tau) * _logistic(margins) + exponential


def orpo_loss(pairs: PairLogps, beta: float) -> Tensor:
    """ORPO's odds-ratio term, reference-free; beta is its lambda. The SFT term comes from `DPOLoss(sft_weight=1)`.

    `log_odds(m) = m - log(1 - exp(m)); -beta * logsigmoid(log_odds(mean chosen) - log_odds(mean rejected))`
    Source: Hong, Lee and Thorne 2024, arXiv:2403.07691.
    """
    chosen, rejected = (_log_odds(mean) for mean in pairs.mean_logps)
    return beta * _logistic(chosen - rejected)


def _log_odds(logp: Tensor) -> Tensor:
    """`log(p / (1 - p))` from `log(p)`; p = 1, whose odds are infinite, counts as the next number below it."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


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


LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(sigmoid_loss, ("label_smoothing",)),
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
    """Whether the loss compares the policy with a reference model."""
    return loss_spec(loss_type).reference


def check_label_smoothing(label_smoothing: float) -> None:
    """Refuse what is not the probability of a flipped label."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), got {label_smoothing}; it is the probability that a label is "
            "flipped, and at 0.5 labels say nothing"
        )


def desensitized_weights(
    chosen_lengths: Sequence[int] | Tensor, rejected_lengths: Sequence[int] | Tensor, alpha: float
) -> Tensor:
    """Token weights of LD-DPO: what a response has beyond the other one's length counts alpha.

    `weight[t] = 1 if t < min(chosen_length, rejected_length) else alpha`

    Args:
        chosen_lengths, rejected_lengths: `[B]` scored tokens, integers on the host.
        alpha: in [0, 1]; 1 is plain DPO, 0 drops the excess.

    Returns:
        fp32 CPU tensor `[sum of lengths]`, in packed order chosen_0, rejected_0, chosen_1, rejected_1, ...

    Raises:
        ValueError: alpha is out of range, or the lengths are not equally many or negative. TypeError: not integers.

    Source: Liu et al. 2024, "Length Desensitization in Direct Preference Optimization", arXiv:2409.06411.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}; 1 is plain DPO")
    chosen, rejected = [index(length) for length in chosen_lengths], [index(length) for length in rejected_lengths]
    if len(chosen) != len(rejected) or min(chosen + rejected, default=0) < 0:
        raise ValueError(
            f"chosen_lengths and rejected_lengths must hold one length >= 0 per response, got {chosen} and {rejected}"
        )
    weights: list[float] = []
    for pair in zip(chosen, rejected, strict=True):
        for length in pair:
            weights += [1.0] * min(pair) + [alpha] * (length - min(pair))
    return torch.tensor(weights, dtype=torch.float32)
