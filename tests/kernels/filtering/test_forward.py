"""What the forward of the filtered mode notes: the screen, the guard, the tail and the statistics."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fused_dpo.filtering import Filtering
from fused_dpo.head import HeadInputs
from fused_dpo.streaming.filtered_forward import filtered_forward
from fused_dpo.streaming.screener import BLOCK_ROWS, block_spans, exponents, screen_shape, screens_coarsely
from tests.kernels.support.filtered import (
    EPS,
    GUARD,
    coarse_only,
    filtered_tokens,
    naive_token_logps,
    one_sequence,
    vocabulary_problem,
)
from tests.kernels.support.problems import (
    FLOAT64_LOGPS,
    IGNORE,
    assert_close,
    make_problem,
    naive_logits,
    present,
    tokens,
)

pytestmark = pytest.mark.cpu_units


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_screen_of_the_forward(dtype: torch.dtype) -> None:
    """Exponents of the largest and of the mean of each block's rows, of sequences of all lengths.

    Coarse probabilities of logits up to 20 are off by a tenth at most, so one exponent in ten may be. That of
    fp32 takes what is below 2e-26 of the row's largest for 0.
    """
    lengths = (200, 1, 0, 31)
    problem = make_problem(lengths, 3000, 64, shift=False).to(dtype)
    problem = replace(problem, weight=3 * problem.weight)
    rows, shape = torch.arange(232), screen_shape(problem.hidden, problem.head, 232, 4, 128)
    options: Any = {"screen_shape": shape, "want_stats": False}
    offsets = present(problem.cu_seqlens)
    inputs = HeadInputs(problem.hidden, problem.labels.clamp(min=0), rows, problem.head, 128)
    screen = filtered_forward(inputs, Filtering(EPS, 1.0), cu_seqlens=offsets, **options)[3]
    spans = block_spans(rows, offsets, BLOCK_ROWS)
    assert spans == [(0, 128), (128, 200), (200, 201), (201, 232)]
    in_fp32 = dtype != torch.float64 and not screens_coarsely(problem.hidden, problem.head)
    p = naive_logits(problem.hidden.double(), problem.to(torch.float64)).softmax(1)
    for block, (start, stop) in enumerate(spans):
        part = p[start:stop]
        for got, truth in zip(screen[block], (part.amax(0), part.mean(0)), strict=True):
            faint = (truth < 2e-26) & (got == 0) & in_fp32
            off = (got.int() - exponents(truth).int()).masked_fill(faint, 0)
            assert (off == 0).double().mean() > (0.85 if dtype == torch.bfloat16 else 0.9999)
            assert off.abs().max() <= 1
    assert (screen[len(spans) :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_blocks_at_the_guard(dtype: torch.dtype) -> None:
    """A block whose mean tail is above it keeps everything, the next one in the sequence is judged on its own.

    Rows of both blocks lie on both sides of the guard.
    """
    tails = torch.tensor([0.14, 0.002] * 64 + [0.11, 0.002] * 64, dtype=torch.float64)  # means 0.071 and 0.056
    weight = torch.zeros(8192, 1, dtype=dtype)
    weight[0] = 1
    logits = (8191 / tails - 8191).log()
    problem = one_sequence(logits[:, None].to(dtype), weight, torch.zeros(256, dtype=torch.int64))
    got = filtered_tokens(problem, ["tail", "kept_fraction"])
    tail, fraction = present(got.tail), present(got.kept_fraction)
    assert (tail[:128] == 0).all()
    assert (fraction[:128] == 1).all()
    # In fp32 8191 equal terms are added up, whose roundings do not average out.
    assert_close("tail", tail[128:], tails[128:], FLOAT64_LOGPS if dtype == torch.float64 else 1e-4)
    assert (fraction[128:] == 1 / 8192).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tail_and_kept_fraction(dtype: torch.dtype) -> None:
    """By hand, block by block: what is above eps in any of its rows, or a target, is kept, and the first column."""
    problem = make_problem((200, 50, 1, 130), 3000, 32, shift=False)
    problem = replace(problem, weight=3 * problem.weight)
    problem.hidden[200:250] /= 20  # a flat sequence, computed exactly
    problem = problem.to(dtype)
    got = filtered_tokens(problem, ["tail", "kept_fraction"])
    p = naive_logits(problem.hidden.double(), problem.to(torch.float64)).softmax(1)
    tail, fraction = torch.zeros(len(p), dtype=torch.float64), torch.zeros(len(p), dtype=torch.float64)
    exact_blocks = []
    for start, stop in problem.spans:
        scored = (problem.labels[start:stop] >= 0).nonzero().squeeze(1) + start
        for rows in scored.split(BLOCK_ROWS):
            keep = (p[rows] > EPS).any(0)
            keep[problem.labels[rows]] = True
            keep[0] = True  # there is always one to look at
            mass = p[rows][:, ~keep].sum(1)
            exact = bool(mass.mean() > GUARD) or int(keep.sum()) > 1500
            exact_blocks.append(exact)
            tail[rows], fraction[rows] = (0.0, 1.0) if exact else (mass, int(keep.sum()) / 3000)
    assert sorted(exact_blocks) == [False, False, False, False, True]
    # In fp32 a probability has the rounding of its logit of up to 40, 4e-6.
    assert_close("tail", present(got.tail), tail, FLOAT64_LOGPS if dtype == torch.float64 else 1e-5)
    assert_close("kept fraction", present(got.kept_fraction), fraction, 1e-7)  # a quotient in fp32
    ignored = problem.labels == IGNORE
    assert (present(got.tail)[ignored] == 0).all()
    assert (present(got.kept_fraction)[ignored] == 0).all()
    assert (tail[~ignored] > 0).any()


def test_stats_of_the_exact_mode() -> None:
    problem = make_problem((20, 30), 3000, 32)
    got = tokens(problem, ["tail", "kept_fraction"], impl="streaming", grad_mode="exact")
    assert (present(got.tail) == 0).all()
    assert torch.equal(present(got.kept_fraction), (problem.aligned != IGNORE).to(torch.float64))


@coarse_only
def test_statistics_under_a_coarse_screen() -> None:
    """Entropy and mean logit where the tail's logits are rounded to bf16.

    A tail of mass t moves the entropy by no more than the relative error of its weights (two roundings of 2^-9 of
    logits below 40, 0.16) times its share of the entropy, `t log(V / t)`. Roundings average out in the mean logit: at
    most a hundredth of the largest, 0.16.
    """
    problem = vocabulary_problem((100, 40))
    names = ["entropy", "mean_logit", "is_top1", "tail", "kept_fraction"]
    got = filtered_tokens(problem, names)
    assert present(got.kept_fraction).max() < 0.5
    logits = naive_logits(problem.hidden.double(), problem.to(torch.float64))
    assert logits.abs().max() < 48
    log_p = logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    tail = present(got.tail).double()
    assert tail.min() > 1e-4
    bound = 0.16 * tail * (49152 / tail).log()
    # 1e-5: fp32 at the size of the logits.
    assert ((present(got.entropy) - entropy).abs() <= bound + 1e-5).all()
    assert (present(got.entropy) - entropy).abs().max() < 0.01
    assert (present(got.mean_logit) - logits.mean(1)).abs().max() <= 0.0016
    assert torch.equal(present(got.is_top1), log_p.argmax(1) == problem.labels)
    exact = naive_token_logps(problem.to(torch.float64))
    assert ((got.logps - exact).abs() <= 0.16 * tail + 1e-5).all()
