"""`fused_dpo_logps`, values and all gradients, against float64: features, forms, shapes, dtypes."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_dpo import fused_dpo_logps
from tests.kernels.support.problems import (
    DTYPES,
    FLOAT64_LOGPS,
    IGNORE,
    Problem,
    assert_agrees,
    assert_close,
    cu_seqlens,
    dtype_id,
    evaluate,
    fused,
    make_problem,
    naive_logps,
    present,
    uninitialized_memory_is_nan,
)

pytestmark = pytest.mark.cpu_units

FEATURES = {
    "plain": {},
    "padded": {"padded": True},
    "aligned": {"shift": False},
    "padded aligned": {"shift": False, "padded": True},
    "average": {"average": True},
    "bias": {"bias": True},
    "logit_scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 4.0},
    "temperature": {"temperature": 0.7},
    "lora": {"lora_rank": 5},
    "everything": {
        "bias": True,
        "logit_scale": 1.7,
        "softcap": 4.0,
        "temperature": 0.7,
        "lora_rank": 5,
        "average": True,
        "padded": True,
    },
}
# (lengths, V, D, workspace in MiB): one token; a row more or less than the 64 and 256 rows of a tile; vocabularies and
# widths that no tile divides; with 1 MiB a slice holds 400 to 1000 columns, so V = 5003 takes many of them.
SHAPES = [
    ((1,), 7, 1, 64),
    ((2,), 1, 1, 64),
    ((63,), 1, 33, 64),
    ((64, 1, 65), 7, 64, 1),
    ((257,), 5003, 64, 1),
    ((300, 0, 2), 5003, 1, 1),
    ((31, 31), 5003, 33, 1),
    ((100, 412), 1001, 33, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_features(features: dict, dtype: torch.dtype) -> None:
    problem = make_problem((5, 63, 1, 190, 70), **features).to(dtype)
    assert_agrees(evaluate(fused, problem), problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("lengths", "V", "D", "workspace_mib"), SHAPES)
def test_shapes(lengths: tuple[int, ...], V: int, D: int, workspace_mib: int, dtype: torch.dtype) -> None:
    problem = make_problem(lengths, V, D, shift=False).to(dtype)
    assert_agrees(evaluate(lambda p: fused(p, workspace_mib=workspace_mib), problem), problem)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_reference_is_the_truth(features: dict) -> None:
    problem = make_problem(**features)
    assert_agrees(evaluate(lambda p: fused(p, impl="reference"), problem), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_reference_within_budget(dtype: torch.dtype) -> None:
    problem = make_problem(**FEATURES["everything"]).to(dtype)
    assert_agrees(evaluate(lambda p: fused(p, impl="reference"), problem), problem)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64)] + [(d, torch.float32) for d in DTYPES[1:]],
    ids=dtype_id,
)
def test_dtypes_of_results(dtype: torch.dtype, expected: torch.dtype) -> None:
    logps, grads = evaluate(fused, make_problem(bias=True, lora_rank=2).to(dtype))
    assert logps.dtype == expected
    assert {name: grad.dtype for name, grad in grads.items() if grad is not None} == dict.fromkeys(grads, dtype)


def test_default_implementation_is_streaming_on_cpu() -> None:
    problem = make_problem().to(torch.float32)
    assert torch.equal(fused(problem, impl=None), fused(problem, impl="streaming"))


def test_workspace_changes_memory_only() -> None:
    problem = make_problem((40, 30), V=5003, D=64)
    assert_close("logps", fused(problem, workspace_mib=1), fused(problem, workspace_mib=256), FLOAT64_LOGPS)


def test_bare_weight_is_a_head_without_extras() -> None:
    problem = make_problem()
    bare = fused_dpo_logps(problem.hidden, problem.weight, problem.labels, cu_seqlens=problem.cu_seqlens)
    assert torch.equal(bare, fused(problem))


def test_head_is_applied_in_the_documented_order() -> None:
    """Softcap after the scale and before the temperature; the bias inside both. Written out, one row, no helper."""
    p = make_problem((1,), V=5, D=3, shift=False, **{k: v for k, v in FEATURES["everything"].items() if k != "padded"})
    p = replace(p, labels=torch.tensor([4]), average=False)
    assert p.lora_a is not None
    assert p.lora_b is not None
    assert p.bias is not None
    logits = p.weight @ p.hidden[0] + p.bias + 1.5 * p.lora_b @ (p.lora_a @ p.hidden[0])
    logits = 4.0 * torch.tanh(1.7 * logits / 4.0) / 0.7
    expected = logits[4] - logits.exp().sum().log()
    assert_close("logps", fused(p), expected[None], FLOAT64_LOGPS)


def test_shift_stays_within_packed_sequences() -> None:
    """Negative control: predicting a sequence's first token from its neighbour's last state is another number."""
    problem = make_problem((3, 4, 5))
    problem = replace(problem, labels=torch.randint(0, 257, (12,)))
    crossing = torch.cat((problem.labels[1:], torch.tensor([IGNORE])))
    wrong = naive_logps(replace(problem, labels=crossing, shift=False))
    right = naive_logps(problem)
    assert_close("logps", fused(problem), right, FLOAT64_LOGPS)
    assert ((wrong - right).abs() > 0.1)[:2].all()  # nats: one unrelated token's log-prob each
    first_token_changed = replace(problem, labels=problem.labels.clone())
    first_token_changed.labels[[0, 3, 7]] = 11
    assert torch.equal(fused(first_token_changed), fused(problem))


def test_uninitialized_memory_never_shows() -> None:
    problem = make_problem((300, 0, 2), V=1001, **FEATURES["everything"])
    with uninitialized_memory_is_nan():
        assert torch.empty(1).isnan()  # negative control
        assert_agrees(evaluate(lambda p: fused(p, workspace_mib=1), problem), problem)
        nothing_scored = replace(problem, labels=torch.full_like(problem.labels, IGNORE))
        for grad in evaluate(fused, nothing_scored).grads.values():
            assert (present(grad) == 0).all()


@given(
    sequences=st.lists(st.lists(st.sampled_from([IGNORE, 0, 1, 2, 6]), max_size=5), max_size=6),
    shift=st.booleans(),
    average=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_any_packing(sequences: list[list[int]], shift: bool, average: bool) -> None:
    """Any mixture of empty, ignored and scored sequences equals one-by-one evaluation."""
    lengths = [len(labels) for labels in sequences]
    labels = torch.tensor(list(chain.from_iterable(sequences)), dtype=torch.int64)
    hidden, weight = torch.randn(len(labels), 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    problem = Problem(hidden, weight, labels, cu_seqlens(lengths), shift=shift, average=average)
    got = fused(problem)
    assert got.shape == (len(sequences),)
    if sequences:
        assert_close("logps", got, naive_logps(problem), FLOAT64_LOGPS)
