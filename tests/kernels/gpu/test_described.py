"""Tensor descriptors in place of pointers, and the flattened loop: the same numbers by another way of loading."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fused_dpo.gpu import configs as triton_configs
from fused_dpo.gpu import launch
from tests.kernels.support.gpu import DEVICE, TRITON_DTYPES, on_device
from tests.kernels.support.problems import EVERY_FEATURE, Problem, assert_same_bits, evaluate, fused, make_problem

EVERYTHING = {**EVERY_FEATURE, "softcap": 4.0}

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU python -m benchmarks.tuning checks and times them")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ask for descriptors; the list tells, launch by launch, how operands were named."""
    config = replace(triton_configs.INTERPRETER_CONFIG, described=True, flattened=True)
    monkeypatch.setattr(triton_configs, "INTERPRETER_CONFIG", config)
    seen: list[str] = []
    real = launch.Tiles.arguments

    def noted(tiles: launch.Tiles, operand: Any = None) -> dict[str, Any]:
        found = real(tiles, operand)
        if operand is not None:  # kept columns and rows are gathered by pointers
            seen.append("descriptors" if found["OPTIONS"].DESCRIBED else "pointers")
        return found

    monkeypatch.setattr(launch.Tiles, "arguments", noted)
    return seen


def by_triton(problem: Problem, grad_mode: str) -> Any:
    return evaluate(lambda p: fused(p, impl="triton", grad_mode=grad_mode), problem)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("grad_mode", ["exact", "filtered"])
@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(("V", "D"), [(67, 24), (64, 16), (1, 8)])
def test_the_same_bits(
    V: int, D: int, settings: dict[str, Any], grad_mode: str, dtype: torch.dtype, names: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Edges of tiles in rows, columns and dimensions, and rows that are not scored in between."""
    problem = on_device(make_problem((5, 23, 1, 8), V=V, D=D, **settings).to(dtype))
    got = by_triton(problem, grad_mode)
    assert set(names) == {"descriptors"}
    monkeypatch.undo()
    assert_same_bits(got, by_triton(problem, grad_mode), "loaded by pointers")


@pytest.mark.parametrize(("D", "transposed"), [(17, False), (16, True)], ids=["odd rows", "transposed weight"])
def test_what_descriptors_cannot_name_keeps_its_pointers(
    D: int, transposed: bool, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = on_device(make_problem((5, 20), V=40, D=D).to(torch.float32))
    if transposed:
        problem = replace(problem, weight=problem.weight.T.contiguous().T)
    got = by_triton(problem, "exact")
    assert set(names) == {"pointers"}
    monkeypatch.undo()
    assert_same_bits(got, by_triton(problem, "exact"), "loaded by pointers")


def test_which_tensors_descriptors_can_name() -> None:
    """Contiguous rows that begin at multiples of 16 bytes, of one dtype."""
    hidden, weight, can = torch.zeros(6, 16), torch.zeros(40, 16), launch.describable
    assert can(hidden, weight)
    assert can(torch.zeros(6, 20)[:, 4:], weight)
    assert not can(torch.zeros(6, 20)[:, 1:17], weight), "between multiples of 16 bytes"
    assert not can(hidden, torch.zeros(40, 18)[:, :16]), "rows of 72 bytes"
    assert not can(hidden, torch.zeros(16, 40).T), "columns are contiguous"
    assert not can(hidden.half(), weight), "two dtypes"
