"""The truth in float64, errors against it, and the budget that an implementation keeps before it is given a time."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.heads.replay import Replay

ROWS = 256
"""Rows of float64 logits at a time."""


class Truth(NamedTuple):
    """Log-probs and gradients of one problem, from its numbers as they are."""

    logps: Tensor
    """float64 [S]."""
    dhidden: Tensor
    """float32 [N, D]; rounding it adds 3e-8 to the relative errors, a thousandth of what bf16 results have."""
    dweight: Tensor
    """float32 [V, D]."""


@dataclass(frozen=True)
class Budget:
    """Largest errors that still count as the same computation."""

    token_logp_rms_nat: float
    gradient: float
    """Relative, in the Frobenius norm."""


BF16_LOGITS = Budget(0.06, 0.03)
"""Logits rounded to bf16: those of trained models reach 32, where neighbours are 0.125 apart, an error of 0.036 rms in
the target's logit, and bf16 log-probs lie as far apart; each softmax is off by that much relatively, and gradients,
in which most of it cancels, by about 1.2 %; of a DPO loss by half of beta times a sequence's error more."""
EXACT = Budget(1e-3, 0.004)
"""Logits in fp32: log-probs are good to fp32 sums; gradients are rounded to bf16 twice, 2^-9 each."""
FILTERED = Budget(1e-3, 0.006)
"""Half of what naive bf16 gradients are off by."""
IN_FLOAT32 = {BF16_LOGITS: Budget(1e-3, 1e-4), EXACT: Budget(1e-5, 3e-6), FILTERED: Budget(1e-5, FILTERED.gradient)}
"""The budget on float32 numbers, by that on bf16 ones. On SmolLM2's head and 1,024 real rows the usual code is off by
7e-5 nat a token and 9e-6 in gradients; in those of a DPO loss by 7e-5, by half of beta times a sequence's error.
It is the sum of exponentials that is off, and more for larger V: by 8e-4 nat and 8e-5 with Gemma 3's 262,144 columns.
Exact is off by 2e-6 nat and 8e-7. Gradients that were rounded to bf16 are over all but the filtered."""


def upstream(problem: Replay) -> Tensor:
    """Make the gradient of a DPO loss before its first step, up to its scale: -1 for chosen, +1 for rejected, [S]."""
    signs = torch.ones(len(problem.cu_seqlens) - 1, device=problem.hidden.device)
    signs[0::2] = -1.0
    return signs


def truth(problem: Replay) -> Truth:
    """Compute log-probs and the gradients for `upstream` in float64, some rows at a time."""
    weight = problem.weight.double()
    g = upstream(problem).double().repeat_interleave(problem.cu_seqlens.diff().long())
    token_logps, dhidden, dweight = [], [], torch.zeros_like(weight)
    for hidden, target, g_part in zip(*(x.split(ROWS) for x in (problem.hidden, problem.target, g)), strict=True):
        rows = hidden.double()
        log_p = (rows @ weight.T).log_softmax(-1)
        token_logps.append(log_p.gather(1, target[:, None]).squeeze(1))
        dz = log_p.exp_().neg_()
        dz[torch.arange(len(target), device=dz.device), target] += 1.0
        dz *= g_part[:, None]
        dhidden.append((dz @ weight).float())
        dweight.addmm_(dz.T, rows)
    logps = torch.segment_reduce(torch.cat(token_logps), "sum", offsets=problem.cu_seqlens.long())
    return Truth(logps, torch.cat(dhidden), dweight.float())


def relative_error(got: Tensor, true: Tensor) -> float:
    """Measure an error in the Frobenius norm, a piece at a time: a float64 copy of a gradient is large."""
    squares = sum((a.double() - b).square().sum() for a, b in zip(got.split(8192), true.split(8192), strict=True))
    return float((squares / true.double().square().sum()) ** 0.5)


def logp_errors(logps: Tensor, problem: Replay, true: Truth) -> dict[str, float]:
    """Measure the worst sequence, and the error a token: root mean square of error / sqrt(length)."""
    error = logps.double() - true.logps
    a_token = (error.square() / problem.cu_seqlens.diff()).mean().sqrt()
    return {"worst_logp_error_nat": float(error.abs().max()), "token_logp_rms_nat": float(a_token)}


def gradient_errors(dhidden: Tensor, dweight: Tensor | None, scale: float, true: Truth) -> dict[str, float]:
    """Measure the relative errors of gradients for `scale` times the upstream gradient of the truth."""
    errors = {"dhidden_error": relative_error(dhidden.float() / scale, true.dhidden)}
    if dweight is not None:
        errors["dweight_error"] = relative_error(dweight.float() / scale, true.dweight)
    return errors


def over_budget(errors: dict[str, float], budget: Budget) -> list[str]:
    """List what is worse than the budget allows; not a number is."""
    bounds = {
        "token_logp_rms_nat": budget.token_logp_rms_nat,
        "dhidden_error": budget.gradient,
        "dweight_error": budget.gradient,
    }
    return [
        f"{name} {errors[name]:.3g} over {bound:g}"
        for name, bound in bounds.items()
        if name in errors and not errors[name] <= bound
    ]
