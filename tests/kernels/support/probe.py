"""The theorem of `fused_dpo.filtering` as an assertion, on gradients of the logits that a probe makes visible."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tests.kernels.support.filtered import filtered_tokens, judgements
from tests.kernels.support.problems import Problem, cu_seqlens

COARSE_FACTOR = 1.5
"""What the rounding of a coarse screen may move the first inequality by, as stated."""
COARSE_TAIL = 0.3
"""Of the tail's mass, what a row may be off by under a coarse screen: two roundings of logits below 64."""


class Draw(NamedTuple):
    logits: Tensor
    target: Tensor
    upstream: Tensor
    lengths: list[int]


def peaked(R: int = 40, V: int = 300) -> Draw:
    """Rows that are somewhat alike, with likely targets: half of the columns or more are small in all of them."""
    logits = 4 * torch.randn(1, V, dtype=torch.float64) + torch.randn(R, V, dtype=torch.float64)
    target = torch.where(torch.rand(R) < 0.7, logits.argmax(1), torch.randint(0, V, (R,)))
    return Draw(logits, target, torch.full((R,), 0.7, dtype=torch.float64), [R])


UPSTREAMS: dict[str, Callable[[Tensor, Sequence[int]], Tensor]] = {
    "equal": lambda noise, lengths: torch.full_like(noise, -1.3),
    "by sequence": lambda noise, lengths: spread(noise, lengths),
    "by sequence, 12 decades": lambda noise, lengths: 10 ** (4 * spread(noise, lengths)),
    "tiny": lambda noise, lengths: 1e-12 * spread(noise, lengths),
    "huge": lambda noise, lengths: 1e12 * spread(noise, lengths),
    "some zero": lambda noise, lengths: spread(noise, lengths).clamp(min=0),
    "by token": lambda noise, lengths: noise,
    "by token, 12 decades": lambda noise, lengths: 10 ** (4 * noise),
}


def spread(noise: Tensor, lengths: Sequence[int]) -> Tensor:
    """The first value of each sequence for all its rows."""
    return torch.cat([part[:1].expand(len(part)) for part in noise.split(list(lengths))])


class Probe(NamedTuple):
    """The gradient of the logits as it should be and as it is. Everything float64, by scored row."""

    dz: Tensor
    """[R, V]."""
    p: Tensor
    """[R, V]."""
    one_minus_p: Tensor
    """1 - p of the target."""
    of_weight: Tensor
    """dz as the head's gradient has it [R, V]."""
    of_hidden: Tensor
    """And as the hidden states' has it."""
    weight_error: Tensor
    """Of the head's gradient [V, D]."""
    hidden_norm: Tensor
    """|h_r|."""
    keep: Tensor
    """bool [R, V]."""
    block: Tensor
    """int64 [R]."""
    logps: Tensor

    @property
    def kept(self) -> Tensor:
        """What the kept columns got, dz before the correction."""
        return self.of_weight.masked_fill(~self.keep, 0.0)

    @property
    def dropped(self) -> Tensor:
        """What there is to correct for."""
        return self.dz.masked_fill(self.keep, 0.0)


def probe(
    logits: Tensor, target: Tensor, upstream: Tensor, lengths: Sequence[int], dtype: torch.dtype, **options
) -> Probe:
    """dz itself, from a head that is the identity: dH is dz, and dW shows it row by row.

    Hidden states are `[logits | unit vectors of the rows]` and the weight is `[identity | 0]`, so that the columns of
    dW beyond the logits' are dz transposed. In bf16 the logits are two summands, high and low: their sum is what the
    exact path sees, and more than the coarse screen does.
    """
    R, V = logits.shape
    parts = [logits.to(dtype)]
    if dtype == torch.bfloat16:
        parts.append((logits - parts[0].double()).to(dtype))
    logits = torch.stack([part.double() for part in parts]).sum(0)
    hidden = torch.cat([*parts, torch.eye(R, dtype=dtype)], 1).requires_grad_()
    weight = torch.cat([torch.eye(V, dtype=dtype)] * len(parts) + [torch.zeros(V, R, dtype=dtype)], 1).requires_grad_()
    problem = Problem(hidden, weight, target, cu_seqlens(lengths), shift=False)
    with judgements() as seen:
        logps = filtered_tokens(problem, **options).logps
        dhidden, dweight = torch.autograd.grad((logps * upstream.to(logps.dtype)).sum(), (hidden, weight))
    (judgement,) = seen
    log_p = logits.log_softmax(1)
    one_minus_p = -torch.expm1(log_p.gather(1, target[:, None]).squeeze(1))
    dz = -log_p.exp() * upstream[:, None]
    dz[torch.arange(R), target] = upstream * one_minus_p
    return Probe(
        dz,
        log_p.exp(),
        one_minus_p,
        dweight[:, V * len(parts) :].double().T,
        dhidden[:, :V].double(),
        dweight.double() - dz.T @ hidden.detach().double(),
        hidden.detach().double().norm(dim=1),
        judgement.keep[judgement.block_of_row],
        judgement.block_of_row,
        logps.detach().double(),
    )


def means_of_blocks(p: Tensor, block: Tensor) -> Tensor:
    """Mean of each row's block [R, V], float64."""
    blocks = int(block.max()) + 1
    sums = p.new_zeros(blocks, p.shape[1]).index_add(0, block, p)
    return (sums / torch.bincount(block, minlength=blocks)[:, None])[block]


def powers_below(means: Tensor) -> Tensor:
    """Largest power of two that is not above, 0 below 2^-126."""
    return torch.where(means >= 2.0**-126, means.log2().floor().exp2(), 0.0)


def screened(means: Tensor) -> Tensor:
    """What a screen tells of the means."""
    powers = powers_below(means)
    return powers / powers.sum(1, keepdim=True)


def assert_within_theorem(got: Probe, target: Tensor, upstream: Tensor, eps: float, dtype: torch.dtype) -> None:
    """All four statements.

    Rounding comes on top: `unit` of |g| a row (products and sums of up to 300 terms in float64 or fp32, and the
    screen's fp32 exponents; 1 - p is known to the same unit). bf16 rounds dz and the results, and 1 - p and the mass of
    the kept columns are known up to a share of the tail there.
    """
    coarse = dtype == torch.bfloat16
    factor = COARSE_FACTOR if coarse else 1.0
    unit = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2.0**-7}[dtype]
    known = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 4e-6}[dtype]
    R = len(target)
    g, rows = upstream.abs(), torch.arange(R)
    blocks = int(got.block.max()) + 1
    G = torch.zeros(blocks, dtype=torch.float64).scatter_reduce(0, got.block, g, "amax")[got.block]
    s = means_of_blocks(got.one_minus_p.square()[:, None], got.block).sqrt().squeeze(1)
    S = (g * got.one_minus_p).square().mean().sqrt()
    slack = known * torch.maximum(G, g.square().mean().sqrt())
    logarithm = 1 + 1e-5  # thresholds are compared as logarithms in fp32, of up to 100
    largest = factor * eps * (torch.maximum(G * s, S) + slack) * logarithm
    keeps_target = got.keep[rows, target]
    small = g * got.one_minus_p
    assert (small[~keeps_target] <= factor * (eps * S + slack[~keeps_target])).all(), "dropped targets are negligible"

    assert (got.dropped.abs() <= largest[:, None])[keeps_target].all(), "1"

    tolerance = unit * g + torch.finfo(torch.float32).tiny
    if coarse:
        tolerance = tolerance + COARSE_TAIL * g * (1 - got.p.amax(1))  # at most the tail is weighed wrongly
    difference = got.kept - got.dz.masked_fill(~got.keep, 0.0)
    assert (difference.abs() <= tolerance[:, None]).all(), "kept entries are not dz"
    difference = (got.of_hidden - got.of_weight).masked_fill(~got.keep, 0.0)
    assert (difference.abs() <= 2 * tolerance[:, None]).all(), "kept entries are corrected"

    if torch.equal(G, g):
        bound = math.sqrt(2 * factor * eps + (factor * eps) ** 2) * got.dz.norm() + known * g.norm()
        assert got.dropped.norm() <= bound * logarithm, "2"

    # A row that drops its target has |g| (1 - p) <= eps S, and at most twice that is wrong there.
    tail = got.p.masked_fill(got.keep, 0.0).sum(1)
    # The identity's dH_r is dz_r, and a bound on the sum of its entries' errors is sharper than one on its norm.
    wrong = (got.of_hidden - got.dz).masked_fill(got.keep, 0.0).abs().sum(1)
    assert (wrong <= 2 * torch.where(keeps_target, g * tail, small) + 2 * tolerance).all(), "3"

    # What the means are rounded to, wherever the forward's own rounding puts them: fp32 sums of 128 rows, or coarse.
    means, play = means_of_blocks(got.p, got.block), factor if coarse else 1 + 1e-6
    low, high = powers_below(means / play), powers_below(means * play)
    low, high = low / high.sum(1, keepdim=True) / play, high / low.sum(1, keepdim=True) * play
    low, high = low.masked_fill(got.keep, 0.0), high.masked_fill(got.keep, 0.0)
    residual = got.kept.sum(1).abs()[:, None]
    least, most = low.sum(1, keepdim=True), high.sum(1, keepdim=True)
    # Where a row drops its target and no other column has a mean, nothing can stand for the target.
    uneven = got.of_hidden.sum(1).abs() > tolerance * (8 if coarse else 1)
    assert not uneven[keeps_target | (least > 0).squeeze(1)].any(), "3, zero sum"
    around = 2 * tolerance * (8 if coarse else 1)
    spread_out = got.of_hidden.abs().masked_fill(got.keep, 0.0)
    lowest = low / torch.where(most > 0, most, 1.0)
    highest = (high / torch.where(least > 0, least, 1.0)).masked_fill((least == 0) & (high > 0), 1.0)
    assert (spread_out >= residual * lowest - around[:, None]).all(), "3, less than the means"
    assert (spread_out <= residual * highest + around[:, None]).all(), "3, more than the means"

    stand_in = -got.of_weight.masked_fill(got.keep, 0.0) * upstream.sign()[:, None]
    above = g * (g > eps * S * (1 + known) + slack)  # what is not takes no part, or may not
    # A coarse screen has logits of -100 roughly; one in fp32 takes what is below 2e-26 of the row's largest for 0. As a
    # share of the powers that is up to twice as much: these add up to more than a half.
    faint = 2.0**-40 if coarse else 0.0 if dtype == torch.float64 else 4e-26
    tiny = 4 * torch.finfo(torch.float32).tiny + faint * g[:, None]
    assert (stand_in >= low * (above * (1 - 4 * unit))[:, None] - tiny).all(), "4, less than the means"
    assert (stand_in <= high * (g * (1 + 4 * unit))[:, None] + tiny).all(), "4, more than the means"
    share = torch.where(keeps_target, g * (tail + high.sum(1)), 2 * small + g * high.sum(1))
    width = got.weight_error.shape[1]
    rounding = (tolerance * got.hidden_norm).sum() * (math.sqrt(width) if coarse else 1)
    assert got.weight_error.norm(dim=1).sum() <= (share * got.hidden_norm).sum() + 2 * rounding, "4"
