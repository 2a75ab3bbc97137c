"""Pairs for the tests of the losses, and the losses of five of them by the papers' equations in plain `math`."""

import math

import torch

from fused_dpo.losses import LOSSES, PairLogps
from fused_dpo.losses.module import DPOLoss, LossOutput

ACROSS_PAIRS = {"aot", "aot_unpaired"}
SMOOTHED = {name for name, spec in LOSSES.items() if "label_smoothing" in spec.options}

# Five pairs; log-probs are <= 0, lengths differ, the rewards of the last pair are in the wrong order.
CHOSEN = [-4.0, -10.0, -3.0, -7.5, -6.0]
REJECTED = [-5.0, -9.0, -8.0, -7.25, -2.0]
REF_CHOSEN = [-5.0, -8.0, -3.5, -7.0, -4.0]
REF_REJECTED = [-4.5, -9.5, -6.0, -9.0, -4.0]
CHOSEN_LENGTHS = [4, 10, 2, 5, 3]
REJECTED_LENGTHS = [2, 6, 8, 5, 4]
CHOSEN_LOGRATIOS = [1.0, -2.0, 0.5, -0.5, -2.0]
REJECTED_LOGRATIOS = [-0.5, 0.5, -2.0, 1.75, 2.0]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(x: float) -> float:
    return math.log(math.exp(x) / (1 - math.exp(x)))


def exo(x: float, eps: float) -> float:
    p = sigma(x)
    return p * math.log(p / (1 - eps)) + (1 - p) * math.log((1 - p) / eps)


def smoothed(x: float, eps: float) -> float:
    return -(1 - eps) * math.log(sigma(x)) - eps * math.log(1 - sigma(x))


def discopop(x: float) -> float:
    m = sigma(x / 0.05)
    return (1 - m) * -math.log(sigma(x)) + m * math.exp(-x)


# a, b: logratios of chosen and rejected; c, r: the policy's log-probs; n, m: lengths; e: label smoothing.
EQUATIONS = {
    "sigmoid": lambda a, b, c, r, n, m, beta, e: smoothed(beta * (a - b), e),
    "hinge": lambda a, b, c, r, n, m, beta, e: max(0.0, 1 - beta * (a - b)),
    "ipo": lambda a, b, c, r, n, m, beta, e: (a - b - 1 / (2 * beta)) ** 2,
    "ipo_norm": lambda a, b, c, r, n, m, beta, e: (a / n - b / m - 1 / (2 * beta)) ** 2,
    "robust": lambda a, b, c, r, n, m, beta, e: (
        ((1 - e) * -math.log(sigma(beta * (a - b))) + e * math.log(sigma(beta * (b - a)))) / (1 - 2 * e)
    ),
    "exo_pair": lambda a, b, c, r, n, m, beta, e: exo(beta * (a - b), e or 1e-3),
    "nca_pair": lambda a, b, c, r, n, m, beta, e: (
        -math.log(sigma(beta * a)) - 0.5 * math.log(sigma(-beta * a)) - 0.5 * math.log(sigma(-beta * b))
    ),
    "bco_pair": lambda a, b, c, r, n, m, beta, e: -math.log(sigma(beta * a)) - math.log(sigma(-beta * b)),
    "sppo_hard": lambda a, b, c, r, n, m, beta, e: (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2,
    "apo_zero": lambda a, b, c, r, n, m, beta, e: (1 - sigma(beta * a)) + sigma(beta * b),
    "apo_down": lambda a, b, c, r, n, m, beta, e: sigma(beta * a) + (1 - sigma(beta * (a - b))),
    "discopop": lambda a, b, c, r, n, m, beta, e: discopop(beta * (a - b)),
    "sigmoid_norm": lambda a, b, c, r, n, m, beta, e: smoothed(beta * (a / n - b / m), e),
    "simpo": lambda a, b, c, r, n, m, beta, e: smoothed(beta * c / n - beta * r / m - 0.5, e),
    "dpop": lambda a, b, c, r, n, m, beta, e: -math.log(sigma(beta * (a - b - 50 * max(0.0, -a)))),
    "plackett_luce": lambda a, b, c, r, n, m, beta, e: (
        -math.log(math.exp(beta * a) / (math.exp(beta * a) + math.exp(beta * b)))
    ),
    "orpo": lambda a, b, c, r, n, m, beta, e: -beta * math.log(sigma(log_odds(c / n) - log_odds(r / m))),
}


def by_hand(loss_type: str, beta: float, eps: float = 0.0) -> list[float]:
    """Per-pair losses of the five pairs, in Python floats."""
    if loss_type in ACROSS_PAIRS:
        upper, lower = sorted(CHOSEN_LOGRATIOS), sorted(REJECTED_LOGRATIOS)
        if loss_type == "aot":
            upper = sorted(c - r for c, r in zip(CHOSEN, REJECTED, strict=True))
            lower = sorted(c - r for c, r in zip(REF_CHOSEN, REF_REJECTED, strict=True))
        return [smoothed(beta * (u - v), eps) for u, v in zip(upper, lower, strict=True)]
    columns = (CHOSEN_LOGRATIOS, REJECTED_LOGRATIOS, CHOSEN, REJECTED, CHOSEN_LENGTHS, REJECTED_LENGTHS)
    return [EQUATIONS[loss_type](*row, beta, eps) for row in zip(*columns, strict=True)]


def example(dtype: torch.dtype = torch.float64) -> PairLogps:
    logps = [torch.tensor(values, dtype=dtype) for values in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)]
    lengths = [torch.tensor(values) for values in (CHOSEN_LENGTHS, REJECTED_LENGTHS)]
    return PairLogps(*logps, *lengths)


def run(module: DPOLoss, pairs: PairLogps, rows: slice = slice(None), **counts: float | torch.Tensor) -> LossOutput:
    values = {name: None if value is None else value[rows] for name, value in vars(pairs).items()}
    logps = [values.pop(name) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
    return module(*logps, **values, **counts)


def random_pairs(B: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    logps = [-0.1 - 8 * torch.rand(B, generator=generator, dtype=dtype) for _ in range(4)]
    lengths = [torch.randint(1, 9, (B,), generator=generator) for _ in range(2)]
    margins = torch.rand(B, generator=generator, dtype=dtype)
    rankings = torch.arange(B)  # each pair is one of its own
    return PairLogps(
        logps[0].requires_grad_(),
        logps[1].requires_grad_(),
        logps[2],
        logps[3],
        *lengths,
        margins=margins,
        rankings=rankings,
    )
