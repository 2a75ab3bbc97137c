"""Real hidden states (SmolLM2-135M-Instruct on answers of preference pairs): what random numbers do not show."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.support.filtered import EPS, GUARD, coarse_only, filtered_tokens, gradients, judgements
from tests.kernels.support.problems import (
    Evaluation,
    Problem,
    compose,
    evaluate,
    fused,
    naive_logits,
    naive_logps,
    present,
    relative_error,
    truth_of,
)

FILE = Path(__file__).resolve().parents[4] / "shared" / "data" / "hidden" / "smollm2_helpful.safetensors"
SEQUENCES = 12

pytestmark = [
    pytest.mark.cpu_units,
    pytest.mark.skipif(not FILE.exists(), reason="needs ../shared/data/hidden/smollm2_helpful.safetensors"),
]


def load(first: int, stop: int) -> Problem:
    """Some sequences, in bf16 as the model had them, against the whole vocabulary of 49152."""
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(FILE, "pt") as file:
        data = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    offsets = data["cu_seqlens"][first : stop + 1]
    rows = slice(int(offsets[0]), int(offsets[-1]))
    weight = (data["weight_int8"].float() * data["weight_scale"][:, None]).bfloat16()
    return Problem(data["hidden"][rows], weight, data["target"][rows], offsets - offsets[0], shift=False)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return load(0, SEQUENCES)


@pytest.fixture(scope="module")
def truth(problem: Problem) -> Evaluation:
    return truth_of(problem)


@pytest.fixture(scope="module")
def naive(problem: Problem) -> Evaluation:
    """bf16 logits, fp32 log-softmax: what everybody runs."""
    return evaluate(naive_logps, problem)


@pytest.fixture(scope="module", params=["exact", "filtered"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def streamed(problem: Problem, mode: str) -> Evaluation:
    return evaluate(lambda p: fused(p, grad_mode=mode), problem)


def worst(logps: Tensor, truth: Tensor) -> float:
    return float((logps.double() - truth).abs().max())


def test_size(problem: Problem) -> None:
    assert 500 <= problem.hidden.shape[0] <= 1200  # enough tokens for the errors to show, few enough to be quick


def test_sequence_logps(streamed: Evaluation, naive: Evaluation, truth: Evaluation) -> None:
    """Worst sequence: at most a hundredth of naive bf16's error, which is tenths of a nat."""
    naive_error = worst(naive.logps, truth.logps)
    assert naive_error > 0.05
    assert worst(streamed.logps, truth.logps) <= naive_error / 100


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_gradients(name: str, mode: str, streamed: Evaluation, naive: Evaluation, truth: Evaluation) -> None:
    """Exact at most a quarter, filtered at most half of naive bf16's relative error, which is about one percent."""
    naive_error = relative_error(naive.grads[name], truth.grads[name])
    assert naive_error > 0.005
    bound = naive_error / {"exact": 4, "filtered": 2}[mode]
    assert relative_error(streamed.grads[name], truth.grads[name]) <= bound


def test_same_bits_alone(problem: Problem, mode: str, streamed: Evaluation) -> None:
    """Sequences one by one, where the whole batch ran together with gradients."""
    for i in (0, 5):
        assert torch.equal(fused(compose(problem, [i]), grad_mode=mode), streamed.logps[i : i + 1])


@coarse_only
def test_real_hidden_states() -> None:
    """Filtered, token by token, with upstream gradients as of a batch in which some pairs are saturated."""
    problem = load(40, 45)  # five that the tests above do not take
    T = len(problem.labels)
    exact = problem.to(torch.float64)
    logits = naive_logits(exact.hidden, exact)
    log_p = logits.log_softmax(1)
    rows = torch.arange(T)
    truth = log_p[rows, problem.labels.long()]
    got = filtered_tokens(problem, ["tail", "kept_fraction", "entropy", "mean_logit"])
    naive = naive_logits(problem.hidden, problem).log_softmax(1)[rows, problem.labels.long()]
    assert (got.logps - truth).abs().max() <= (naive - truth).abs().max() / 10
    assert present(got.kept_fraction).max() < 0.2
    assert present(got.tail).mean() < GUARD
    # Of the tail, a tenth at most, the logits are rounded to bf16: by up to 0.125 at 46, on average by far less.
    assert (present(got.entropy) - -(log_p.exp() * log_p).sum(1)).abs().max() < 0.02
    assert (present(got.mean_logit) - logits.mean(1)).abs().max() < 0.002

    sizes = [stop - start for start, stop in problem.spans]
    upstream = torch.tensor([0.1, -0.1, 1e-3, -1e-5, 0.05], dtype=torch.float64)
    upstream = upstream.repeat_interleave(torch.tensor(sizes))
    dz = -log_p.exp() * upstream[:, None]
    dz[rows, problem.labels.long()] += upstream
    with judgements() as seen:
        dhidden, dweight = gradients(problem, upstream)
    kept = seen[0].keep[seen[0].block_of_row]
    assert dz.masked_fill(kept, 0.0).norm() <= math.sqrt(2 * EPS) * dz.norm()
    by_sequence = [part.double().mean() for part in kept.split(sizes)]
    assert by_sequence[2] < by_sequence[0] / 4
    assert by_sequence[3] == 0
    # Naive bf16 is off by one percent (see `test_gradients`).
    assert relative_error(dhidden, dz @ exact.weight) < 0.01
    assert relative_error(dweight, dz.T @ exact.hidden) < 0.01
