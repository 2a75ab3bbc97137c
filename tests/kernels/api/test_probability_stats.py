"""`log_sum_sq_probs` and the ties of `is_top1`, by every implementation, against float64."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_dpo import LMHead
from fused_dpo.filtering import Filtering
from fused_dpo.gpu.configs import SPLIT_COLUMNS
from fused_dpo.ops.token_logps import token_logps
from tests.kernels.support.filtered import coarse_only, filtered_tokens, one_sequence
from tests.kernels.support.gpu import DEVICE, on_device
from tests.kernels.support.problems import (
    EVERY_FEATURE,
    FLOAT64_LOGPS,
    IGNORE,
    Problem,
    make_problem,
    naive_logits,
    present,
    tokens,
)

NAME = "log_sum_sq_probs"
KERNELS = [(impl, mode) for impl in ("streaming", "triton", "library") for mode in ("exact", "filtered")]
WAYS = [("reference", "exact"), *KERNELS]
FEATURES = [{}, {"bias": True}, {"logit_scale": 0.3}, {"softcap": 9.0}, {"temperature": 0.7}, {"lora_rank": 3}]
of_every_way = pytest.mark.parametrize(("impl", "mode"), WAYS)


def stat(problem: Problem, impl: str, mode: str, name: str = NAME) -> Tensor:
    return present(getattr(tokens(problem, [name], impl, mode, workspace_mib=1), name))


def assert_right(got: Tensor, problem: Problem) -> None:
    """By the textbook's formula, within the docstring's error, and exactly 0 where nothing is scored."""
    problem = problem.to(torch.float64)
    logits = naive_logits(problem.hidden, problem)
    unscored = problem.aligned == IGNORE
    true = logits.softmax(-1).square().sum(-1).log().masked_fill(unscored, 0)
    scale = max(float(logits.abs().max()), math.log(logits.shape[-1]))
    error = float((got.double() - true).abs().max())
    assert error <= (FLOAT64_LOGPS if got.dtype == torch.float64 else 3e-7) * scale, (error, scale)
    assert (got <= 0).all()
    assert (got[unscored] == 0).all()


@pytest.mark.parametrize("gain", [0.01, 1.0, 5.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize("features", [*FEATURES, EVERY_FEATURE], ids=lambda features: "+".join(features) or "plain")
@of_every_way
def test_against_float64(impl: str, mode: str, features: dict[str, Any], gain: float) -> None:
    """Over a number of columns that is no multiple of any tile, and several of them."""
    problem = make_problem((5, 23, 1), V=2300 if impl in ("reference", "streaming") else 301, D=20, **features)
    problem = on_device(replace(problem, weight=problem.weight * gain))
    dtypes = (torch.float32, torch.float64) if impl in ("reference", "streaming") else (torch.float32,)
    for dtype in dtypes:
        assert_right(stat(problem.to(dtype), impl, mode), problem.to(dtype))


@pytest.mark.parametrize("mode", ["exact", "filtered"])
def test_several_splits(mode: str) -> None:
    """Whose largest logits differ, so what the merge scales them by matters."""
    problem = on_device(make_problem((9,), V=2 * SPLIT_COLUMNS + 67, D=4).to(torch.float32))
    assert_right(stat(problem, "triton", mode), problem)


def rows_of(logits: Tensor, target: list[int]) -> Problem:
    """A problem whose logits are the given numbers, in all precision they have."""
    R = len(target)
    return on_device(one_sequence(torch.eye(R), logits.T.contiguous(), torch.tensor(target)))


@of_every_way
def test_rows_known_by_hand(impl: str, mode: str) -> None:
    """Flat, one token alone, two alike, far off zero, one that is all but alone."""
    V = 300
    logits = torch.zeros(6, V)
    logits[1, 299] = 90.0  # alone, and after all others
    logits[2, [3, 250]] = 60.0
    logits[3] = 20000.0  # exp of it overflows, and so does its square
    logits[4] = -20000.0
    logits[5, 7] = 12.0  # all but alone: 1 - p is 2e-3
    got = stat(rows_of(logits, [1] * 6), impl, mode).tolist()
    last = 2 * (12 - math.log(math.exp(12) + V - 1)) + math.log1p((V - 1) * math.exp(-24))
    expected = [-math.log(V), 0.0, -math.log(2), -math.log(V), -math.log(V), last]
    assert got == pytest.approx(expected, abs=1e-6)  # logarithms of sums of 300 terms in fp32
    assert max(got) <= 0
    assert expected[5] == pytest.approx(-0.0036, abs=1e-4)


@of_every_way
def test_impossible_tokens_take_no_part(impl: str, mode: str) -> None:
    """A bias of -inf (padding of the vocabulary), over a whole tile and beyond."""
    problem = make_problem(V=301, bias=True)
    present(problem.bias)[200:] = -torch.inf
    problem = on_device(replace(problem, labels=problem.labels.clamp(max=199)).to(torch.float32))
    possible = replace(problem, weight=problem.weight[:200], bias=present(problem.bias)[:200])
    assert_right(stat(problem, impl, mode), possible)


@pytest.mark.parametrize(("impl", "mode"), KERNELS)
def test_an_invalid_label_changes_nothing(impl: str, mode: str) -> None:
    """Where labels are not looked at: the row's log-prob is NaN, its distribution is what it is."""
    hidden, weight = torch.randn(30, 9, device=DEVICE), torch.randn(50, 9, device=DEVICE)
    offsets, filtering = torch.tensor([0, 30], device=DEVICE), Filtering(2**-12 if mode == "filtered" else 0.0, 1 / 16)
    target = torch.arange(30, device=DEVICE)

    def run(target: Tensor) -> tuple[Tensor, Tensor]:
        logps, stats, _ = token_logps(
            hidden, target, offsets, None, LMHead(weight), impl, 1, filtering, want_stats=True
        )
        assert stats is not None
        return logps, stats.log_sum_sq_probs

    logps, got = run(target.index_fill(0, torch.tensor([7], device=DEVICE), 50))
    assert logps.isnan().nonzero().tolist() == [[7]]
    assert torch.equal(got, run(target)[1])
    assert (got < 0).all()


@coarse_only
@pytest.mark.cpu_units
def test_under_a_coarse_screen() -> None:
    """Columns that are not computed again take part by the screen: here half of the sum is theirs.

    Logits are integers, so only probabilities are rounded to bf16, by 2^-9 of each.
    """
    logits = torch.zeros(3, 1024)
    logits[:, 5] = 4.0
    logits[1, 500:520] = 1.0
    logits[2, 900] = -3.0
    problem = rows_of(logits, [5, 5, 5]).to(torch.bfloat16)
    got = filtered_tokens(problem, [NAME, "tail"], filter_eps=2**-6, tail_guard=1.0)
    p = logits.double().softmax(1)
    sums = p.square().sum(1)
    assert (present(got.tail) > 0.9).all()
    assert (p.square().sum(1) - p[:, 5].square() > 0.2 * sums).all()
    assert present(got.log_sum_sq_probs).double().tolist() == pytest.approx(sums.log().tolist(), abs=4 * 2**-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@of_every_way
def test_every_one_of_equal_maxima_is_top1(impl: str, mode: str, dtype: torch.dtype) -> None:
    """Unlike by `argmax`, which finds the first alone. They lie in different tiles, and in different splits."""
    if dtype == torch.bfloat16 and not (impl == "streaming" or DEVICE == "cuda"):
        pytest.skip("the interpreter does not multiply bf16; the reference computes in fp32")
    V = SPLIT_COLUMNS + 100 if impl == "triton" else 300
    logits = torch.arange(V).remainder(5).neg().float().repeat(4, 1)
    maxima = [3, 140, V - 1]
    logits[:, maxima] = 20.0
    labels = [*maxima, 141]
    got = stat(rows_of(logits, labels).to(dtype), impl, mode, "is_top1").tolist()
    assert got == [True, True, True, False]
    assert (logits.argmax(1) == torch.tensor(labels)).tolist() == [True, False, False, False]
