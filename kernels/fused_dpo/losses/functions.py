"""The one copy of preference-loss mathematics: sequence log-probs in, per-pair losses out.

`DPOLoss` is the front door, `LOSSES` the table of what it computes. Tensors are `[B]`, fp32 or float64. In equations
`chosen` and `rejected` are the policy's sequence log-probs, a `logratio` is policy minus reference, and `delta` is the
chosen logratio minus the rejected one.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_dpo.losses.pairs import PairLogps, check_label_smoothing


def _logistic(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy of "chosen wins", at log-odds `margins`, of a label flipped with that probability."""
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def sigmoid_loss(pairs: PairLogps, beta: float, label_smoothing: float = 0.0, odpo_alpha: float = 0.0) -> Tensor:
    """Compute the loss of DPO; with label smoothing that of conservative DPO, with alpha > 0 DPO with an offset (ODPO).

    `x = beta * delta - alpha * margins; -(1 - eps) * logsigmoid(x) - eps * logsigmoid(-x)`
    Of the paper's two offsets this is the difference of scores itself, not its logarithm: a margin of 0 is plain DPO.
    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; eps: Mitchell 2023, "A note on DPO with noisy preferences";
    alpha: Amini, Vieira and Cotterell 2024, "Direct Preference Optimization with an Offset", arXiv:2402.10571.
    """
    log_odds = beta * pairs.delta
    if odpo_alpha:
        log_odds = log_odds - odpo_alpha * pairs.require("margins")
    return _logistic(log_odds, label_smoothing)


def dpop_loss(pairs: PairLogps, beta: float, dpop_lambda: float = 50.0) -> Tensor:
    """Compute the loss of DPO-Positive: DPO, and a penalty where chosen has become less likely than in the reference.

    `-logsigmoid(beta * (delta - lambda * relu(-chosen_logratios)))`
    Source: Pal et al. 2024, "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
    arXiv:2402.13228, where lambda is 50 and beta 0.3.
    """
    return _logistic(beta * (pairs.delta - dpop_lambda * F.relu(-pairs.chosen_logratios)))


def plackett_luce_loss(pairs: PairLogps, beta: float) -> Tensor:
    """Compute DPO's loss under the Plackett-Luce model: the best answer of a ranking is drawn first, then the next one.

    `r = beta * logratios; L = sum over answers k of -logsigmoid(r_k - logsumexp(r_j for all answers j worse than k))`

    A ranking of K answers is K - 1 pairs with one number in `pairs.rankings`: the best answer as chosen, against each
    other one as rejected, whose `pairs.margins` (0 without) say how much worse it is. Answers with equal margins are
    tied: neither counts as worse than the other, so their terms have no part in each other. The last answer has no
    term. Entry i is the term of rejected answer i, and 1 / (K - 1) of that of the best answer, so a ranking's entries
    add up to L; with K = 2 they are the sigmoid loss, bit for bit. Costs B^2 numbers.

    Source: Rafailov et al. 2023, arXiv:2305.18290, appendix A.3; Plackett 1975; Luce 1959.
    """
    chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
    if pairs.rankings is None:
        same = torch.eye(len(chosen), dtype=torch.bool, device=chosen.device)
    else:
        same = pairs.rankings[:, None] == pairs.rankings
    margins = torch.zeros_like(rejected) if pairs.margins is None else pairs.margins
    worse = same & (margins > margins[:, None])
    best = _first_of(chosen, rejected, same, beta) / same.sum(1)
    return best + _first_of(rejected, rejected, worse, beta)


def _first_of(own: Tensor, others: Tensor, among: Tensor, beta: float) -> Tensor:
    """Compute -log of the probability [B] that answer i is drawn before all others that `among` [B, B] names in row i.

    0, with a gradient of 0, where it names none.
    """
    log_odds = beta * (own[:, None] - others)
    alone = ~among.any(1)
    # The log-sum-exp of nothing has the gradient 0 / 0: such a row gets numbers, which do not get out.
    against = (-log_odds).masked_fill(~among, -math.inf).masked_fill(alone[:, None], 0.0).logsumexp(1)
    return _logistic(-against).masked_fill(alone, 0.0)


def sigmoid_norm_loss(pairs: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute DPO's loss on means. Its beta is larger (Tulu 3: 5), as means are smaller than sums.

    `-logsigmoid(beta * (chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths))`
    Source: Lambert et al. 2024, "Tulu 3", arXiv:2411.15124.
    """
    return _logistic(beta * pairs.norm_delta, label_smoothing)


def simpo_loss(pairs: PairLogps, beta: float, label_smoothing: float = 0.0, simpo_gamma: float = 0.5) -> Tensor:
    """Compute SimPO's loss: mean log-probs without a reference, and a target margin gamma in units of rewards.

    `-logsigmoid(beta * (chosen / chosen_lengths - rejected / rejected_lengths) - gamma)`
    Source: Meng, Xia and Chen 2024, arXiv:2405.14734.
    """
    chosen, rejected = pairs.mean_logps
    return _logistic(beta * (chosen - rejected) - simpo_gamma, label_smoothing)


def hinge_loss(pairs: PairLogps, beta: float) -> Tensor:
    """Compute SLiC's hinge on DPO's margin, as normalised by RSO.

    `relu(1 - beta * delta)`
    Source: Zhao et al. 2023, "SLiC-HF", arXiv:2305.10425; Liu et al. 2023, "RSO", arXiv:2309.06657.
    """
    return F.relu(1 - beta * pairs.delta)


def ipo_loss(pairs: PairLogps, beta: float) -> Tensor:
    """Compute IPO's loss on sums over the sequence, as in the paper, whose tau is beta.

    `(delta - 1 / (2 * beta)) ** 2`
    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    """
    return (pairs.delta - 0.5 / beta).square()


def ipo_norm_loss(pairs: PairLogps, beta: float) -> Tensor:
    """Compute IPO's loss on means over the sequence: TRL's `ipo`.

    `(chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths - 1 / (2 * beta)) ** 2`
    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17, averaged per token as TRL's DPOTrainer does.
    """
    return (pairs.norm_delta - 0.5 / beta).square()


def robust_loss(pairs: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute an unbiased estimate of DPO's loss when labels flip with probability eps. Unbounded below.

    `(-(1 - eps) * logsigmoid(beta * delta) + eps * logsigmoid(-beta * delta)) / (1 - 2 * eps)`
    Source: Ray Chowdhury, Kini and Natarajan 2024, "Provably Robust DPO", arXiv:2403.00409.
    """
    check_label_smoothing(label_smoothing)
    margins = beta * pairs.delta
    as_given, flipped = _logistic(margins), _logistic(-margins)
    return ((1 - label_smoothing) * as_given - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_pair_loss(pairs: PairLogps, beta: float, label_smoothing: float = 1e-3) -> Tensor:
    """Compute EXO's loss: reverse KL from the policy's preference p to the smoothed label (1 - eps, eps), eps > 0.

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
    """Compute NCA's loss: contrast with noise, which also keeps the chosen likelihood from falling.

    `c, r = beta * logratios; -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r)`
    Source: Chen et al. 2024, "Noise Contrastive Alignment", arXiv:2402.05369.
    """
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return _logistic(chosen) + 0.5 * (_logistic(-chosen) + _logistic(-rejected))


def bco_pair_loss(pairs: PairLogps, beta: float, reward_shift: Tensor | float = 0.0) -> Tensor:
    """Compute BCO's loss: rewards classified as above or below the shift, their mean so far; recent TRL has it at 0.

    `-logsigmoid(beta * chosen_logratios - shift) - logsigmoid(-(beta * rejected_logratios - shift))`
    Source: Jung et al. 2024, "Binary Classifier Optimization", arXiv:2404.04656.
    """
    return _logistic(beta * pairs.chosen_logratios - reward_shift) + _logistic(
        reward_shift - beta * pairs.rejected_logratios
    )


def sppo_hard_loss(pairs: PairLogps, beta: float) -> Tensor:
    """Compute SPPO's loss with hard win probabilities: 1 for chosen, 0 for rejected.

    `(chosen_logratios - 0.5 / beta) ** 2 + (rejected_logratios + 0.5 / beta) ** 2`
    Source: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7.
    """
    return (pairs.chosen_logratios - 0.5 / beta).square() + (pairs.rejected_logratios + 0.5 / beta).square()


def apo_zero_loss(pairs: PairLogps, beta: float) -> Tensor:
    """Compute APO-zero: raise chosen, lower rejected. For chosen responses better than the model's own.

    `(1 - sigmoid(beta * chosen_logratios)) + sigmoid(beta * rejected_logratios)`
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7.
    """
    return torch.sigmoid(-beta * pairs.chosen_logratios) + torch.sigmoid(beta * pairs.rejected_logratios)


def apo_down_loss(pairs: PairLogps, beta: float) -> Tensor:
    """Compute APO-down: lower both, rejected more. For chosen responses worse than the model's own.

    `sigmoid(beta * chosen_logratios) + (1 - sigmoid(beta * delta))`
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8.
    """
    return torch.sigmoid(beta * pairs.chosen_logratios) + torch.sigmoid(-beta * pairs.delta)


def aot_loss(pairs: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute paired AOT: the policy's margins against the reference's, by rank. Entry i belongs to rank i, not pair i.

    `d = sort(chosen - rejected) - sort(ref_chosen - ref_rejected); -logsigmoid(beta * d)`
    Source: Melnyk et al. 2024, "Distributional Preference Alignment via Optimal Transport", arXiv:2406.05882.
    """
    margins = pairs.chosen - pairs.rejected
    ref_margins = pairs.require("ref_chosen") - pairs.require("ref_rejected")
    return _logistic(beta * (margins.sort().values - ref_margins.sort().values), label_smoothing)


def aot_unpaired_loss(pairs: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute unpaired AOT (`aot_pair` in older TRL): chosen against rejected logratios, by rank, as `aot_loss`.

    `d = sort(chosen_logratios) - sort(rejected_logratios); -logsigmoid(beta * d)`
    Source: Melnyk et al. 2024, arXiv:2406.05882.
    """
    d = pairs.chosen_logratios.sort().values - pairs.rejected_logratios.sort().values
    return _logistic(beta * d, label_smoothing)


def discopop_loss(pairs: PairLogps, beta: float, tau: float = 0.05) -> Tensor:
    """Compute DiscoPOP's discovered loss: logistic for negative margins, exponential for positive ones.

    `x = beta * delta; m = sigmoid(x / tau); (1 - m) * -logsigmoid(x) + m * exp(-x)`
    Source: Lu et al. 2024, arXiv:2406.08414, Eq. 5.
    """
    margins = beta * pairs.delta
    # m * exp(-x) as one exponential: the factors alone are 0 and inf where x is very negative.
    exponential = torch.exp(F.logsigmoid(margins / tau) - margins)
    return torch.sigmoid(-margins / tau) * _logistic(margins) + exponential


def orpo_loss(pairs: PairLogps, beta: float) -> Tensor:
    """Compute ORPO's odds-ratio term: no reference, beta is its lambda; `DPOLoss(sft_weight=1)` adds its SFT term.

    `log_odds(m) = m - log(1 - exp(m)); -beta * logsigmoid(log_odds(mean chosen) - log_odds(mean rejected))`
    Source: Hong, Lee and Thorne 2024, arXiv:2403.07691.
    """
    chosen, rejected = (_log_odds(mean) for mean in pairs.mean_logps)
    return beta * _logistic(chosen - rejected)


def _log_odds(logp: Tensor) -> Tensor:
    """Compute `log(p / (1 - p))` from `log(p)`; p = 1, whose odds are infinite, counts as the next number below it."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))
