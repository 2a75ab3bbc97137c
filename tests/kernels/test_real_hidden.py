"""Real hidden states (SmolLM2-135M-Instruct on answers of preference pairs): what random numbers do not show."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.helpers import Evaluation, Problem, evaluate, fused, naive_logps, relative_error, truth_of

FILE = Path(__file__).resolve().parents[3] / "shared" / "data" / "hidden" / "smollm2_helpful.safetensors"
SEQUENCES = 12

pytestmark = pytest.mark.skipif(not FILE.exists(), reason="needs ../shared/data/hidden/smollm2_helpful.safetensors")


@pytest.fixture(scope="module")
def problem() -> Problem:
    """The first sequences, in bf16 as the model had them, against the whole vocabulary of 49152."""
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(FILE, "pt") as file:
        data = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    offsets = data["cu_seqlens"][: SEQUENCES + 1]
    T = int(offsets[-1])
    weight = (data["weight_int8"].float() * data["weight_scale"][:, None]).bfloat16()
    return Problem(data["hidden"][:T], weight, data["target"][:T], offsets, shift=False)


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
        start, stop = problem.spans[i]
        alone = replace(
            problem,
            hidden=problem.hidden[start:stop],
            labels=problem.labels[start:stop],
            cu_seqlens=torch.tensor([0, stop - start]),
        )
        assert torch.equal(fused(alone, grad_mode=mode), streamed.logps[i : i + 1])
