"""Gradients through a `FusedHead` on two ranks, against one process with all pairs."""

from typing import Any

import pytest
import torch

from tests.fresh_process import run_ranks

pytest.importorskip("peft")
CASES = (
    "ddp",
    "ddp, a rank with nothing",
    "fsdp1 own",
    "fsdp1 root",
    "fsdp2 adapters on lm_head",
    "fsdp2 adapters on q_proj",
    "fsdp2 own",
    "fsdp2 own, a rank with nothing",
    "fsdp2 own, accumulated",
    "fsdp2 own, after others",
    "fsdp2 own, bf16",
    "fsdp2 own, kept whole",
    "fsdp2 own, resharded",
    "fsdp2 root",
    "fsdp2 root, bf16",
    "fsdp2 tied, root",
    "fsdp2 tied, with embeddings",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote: the gradients of every case, and those of one process."""
    file = tmp_path_factory.mktemp("heads") / "gradients"
    finished = run_ranks(2, "tests.kernels.support.head_ranks", file)
    assert finished.returncode == 0, finished.stderr[-8000:]
    return [torch.load(f"{file}.{rank}") for rank in range(2)]


def errors(ranks: list[dict[str, Any]], case: str) -> dict[str, float]:
    """Relative error of each gradient of a case."""
    got, expected = ranks[0][case]
    assert got.keys() == expected.keys()
    return {name: float((got[name] - expected[name]).norm() / expected[name].norm()) for name in expected}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    """In fp32 but for the order of sums, with bf16 too: there both round the same products of the same micro-batch."""
    assert max(errors(ranks, case).values()) < 1e-6
    (first, _), (second, _) = (rank[case] for rank in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_case_is_looked_at(ranks: list[dict[str, Any]]) -> None:
    assert sorted(name for name in ranks[0] if not name.startswith("control")) == sorted(CASES)


def test_control_a_head_that_is_gathered_and_not_reduced(ranks: list[dict[str, Any]]) -> None:
    """Its gradient is wrong alone, and on no rank another: comparing ranks does not show it."""
    wrong = {name: error for name, error in errors(ranks, "control: full_tensor()").items() if error > 1e-6}
    assert list(wrong) == ["lm_head.weight"]
    assert wrong["lm_head.weight"] > 0.9


def test_control_a_loss_outside_of_what_is_wrapped(ranks: list[dict[str, Any]]) -> None:
    assert min(errors(ranks, "control: outside").values()) > 0.01
    (first, _), (second, _) = (rank["control: outside"] for rank in ranks)
    assert not any(torch.equal(first[name], second[name]) for name in first)
