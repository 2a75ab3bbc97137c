"""What stands for the dropped columns: the mean of the block, in every gradient, through the logits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused_dpo.streaming import filtered_backward
from tests.kernels.support.filtered import gradients, judgements, one_sequence
from tests.kernels.support.probe import UPSTREAMS, means_of_blocks, peaked, probe, screened
from tests.kernels.support.problems import Problem, bits_equal, naive_logits, present, relative_error

pytestmark = pytest.mark.cpu_units


@pytest.mark.parametrize("upstream", ["equal", "by token"])
def test_correction_is_the_mean_of_the_block(upstream: str) -> None:
    """What stands for the dropped columns, entry by entry: scaled to the row's sum in dH, as it is in dW."""
    drawn = peaked()
    drawn = drawn._replace(upstream=UPSTREAMS[upstream](torch.randn(40, dtype=torch.float64), [40]))
    got = probe(*drawn, torch.float64, filter_eps=2.0**-6, tail_guard=1.0)
    residual, dropped = got.kept.sum(1), ~got.keep
    assert dropped[0].sum() > 100
    assert (residual.abs() > 1e-6).all()
    mean = screened(means_of_blocks(got.p, got.block)).masked_fill(got.keep, 0.0)
    of_hidden = torch.where(dropped, -residual[:, None] * mean / mean.sum(1, keepdim=True), got.kept)
    S = (drawn.upstream * got.one_minus_p).square().mean().sqrt()
    heard = torch.where(drawn.upstream.abs() > 2.0**-6 * S, drawn.upstream, 0.0)
    of_weight = torch.where(dropped, -heard[:, None] * mean, got.kept)
    # Sums of 300 terms in float64; the sum of the means, powers of two in 24 bits, in fp32.
    assert (got.of_hidden - of_hidden).abs().max() <= 1e-12
    assert (got.of_weight - of_weight).abs().max() <= 1e-7 * mean.max() * drawn.upstream.abs().max()


def test_correction_takes_no_part_of_rows_without_a_say() -> None:
    """Half of the rows have a gradient far below eps S: they are in no sum of dW, but have their own sum of 0 in dH."""
    drawn = peaked()
    upstream = torch.where(torch.arange(40) % 2 == 0, 1.0, 1e-7).double()
    got = probe(drawn.logits, drawn.target, upstream, drawn.lengths, torch.float64, filter_eps=2.0**-6, tail_guard=1.0)
    dropped = ~got.keep
    assert (got.of_weight[1::2].masked_fill(got.keep[1::2], 0.0) == 0).all()
    assert (got.of_weight[::2][dropped[::2]] < 0).all()
    assert got.of_hidden.sum(1).abs().max() <= 1e-15  # float64, 300 entries of order 0.1 at most


@pytest.mark.parametrize(
    ("tokens_sure", "of_weight"),
    [(3, 0.4), pytest.param(1, 0.8, id="one token, whose mean of nearly 1 counts as a half")],
)
def test_correction_helps_rows_that_are_alike(tokens_sure: int, of_weight: float) -> None:
    """One tail in common, of mass 7e-4 and up to five percent; each row is sure of one of some tokens.

    Both gradients are closer than without, up to the means' rounding to powers of two.
    """
    R, V = 30, 2000
    logits = torch.randn(1, V, dtype=torch.float64) + 0.05 * torch.randn(R, V, dtype=torch.float64)
    logits[:, :tokens_sure] = 0
    target = torch.arange(R) % tokens_sure
    logits[torch.arange(R), target] = 14.0
    got = probe(logits, target, torch.ones(R, dtype=torch.float64), [R], torch.float64, filter_eps=2.0**-6)
    assert (~got.keep).double().mean() > 0.5
    without = (got.kept - got.dz).norm()
    assert (got.of_hidden - got.dz).norm() < without / 3
    assert (got.of_weight - got.dz).norm() < of_weight * without


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_correction_of_every_gradient_of_the_head(dtype: torch.dtype) -> None:
    """Weight, bias and the adapter's B: far closer than without the correction, which the others do not hear of."""
    R, V, D = 60, 3000, 32
    problem = one_sequence(0.05 * torch.randn(R, D), torch.randn(V, D) / 2, torch.arange(R) % 3)
    a, b = 0.1 * torch.randn(3, D), torch.randn(V, 3)
    problem = replace(problem, bias=torch.randn(V), lora_a=a, lora_b=b, lora_scale=0.5)
    problem.hidden[:, :4], problem.weight[:, :4], problem.weight[:3, 1:4] = 0, 0, 14 * torch.eye(3)
    present(problem.bias)[:3] = 0
    b[:3] = 0
    problem.hidden[torch.arange(R), 1 + torch.arange(R) % 3] = 1
    problem = problem.to(dtype)
    upstream = torch.ones(R)

    def run() -> dict[str, Tensor]:
        return dict(zip(problem.tensors, gradients(problem, upstream, filter_eps=2.0**-6), strict=True))

    truth = dict(zip(problem.tensors, gradients(problem.to(torch.float64), upstream, "exact"), strict=True))
    got = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filtered_backward, "_correct_weight", lambda *_: None)
        without = run()
    for name in ("weight", "bias", "lora_b"):
        assert relative_error(without[name], truth[name]) > 0.01
        assert relative_error(got[name], truth[name]) < relative_error(without[name], truth[name]) / 3, name
    for name in ("hidden", "lora_a"):
        assert bits_equal(got[name], without[name])


HEAD = {"logit_scale": 4.0, "softcap": 20.0, "temperature": 0.5}


def far_below(R: int = 30, V: int = 2000) -> Problem:
    """Identity as the head, logits of -29 with one of -16 above them: the derivative of the softcap is a half there."""
    x = -4.6 + torch.randn(1, V, dtype=torch.float64) / 8 + 0.005 * torch.randn(R, V, dtype=torch.float64)
    target = torch.arange(R) % 3
    x[torch.arange(R), target] = -2.1
    return one_sequence(x, torch.eye(V, dtype=torch.float64), target, **HEAD)


def test_correction_goes_through_softcap_scale_and_temperature() -> None:
    """The identity again: an entry of dH is that of dz times the derivative of what happens to the logits."""
    problem = far_below()
    upstream = torch.ones(30)
    with judgements() as seen:
        dhidden, dweight = gradients(problem, upstream, filter_eps=2.0**-6)
    dhidden_true, dweight_true = gradients(problem, upstream, "exact")
    dropped = ~seen[0].keep[0]
    assert dropped.sum() > 1900
    assert dhidden_true[:, dropped].norm() > 0.005 * dhidden_true.norm()
    assert relative_error(dhidden[:, dropped], dhidden_true[:, dropped]) < 0.3
    assert relative_error(dweight[dropped], dweight_true[dropped]) < 0.3
    logits = naive_logits(problem.hidden, problem)
    p = logits.softmax(1)
    mean = screened(p.mean(0, keepdim=True)).squeeze(0).masked_fill(~dropped, 0.0)
    z = mean.clamp(min=1e-30).log() + logits.logsumexp(1).mean()
    dz = mean * (1 - (z * HEAD["temperature"] / HEAD["softcap"]) ** 2) * HEAD["logit_scale"] / HEAD["temperature"]
    # 1e-6: the means, powers of two, are summed in fp32.
    expected = -p[:, dropped].sum(1, keepdim=True) * dz[dropped] / mean.sum()
    assert relative_error(dhidden[:, dropped], expected) <= 1e-6
    expected = -dz[dropped, None] * problem.hidden.sum(0)
    assert relative_error(dweight[dropped], expected) <= 1e-6
