"""Where the tests of the Triton kernels run: on a GPU if there is one, else in Triton's interpreter."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_dpo.gpu.configs import PLAIN, library_config, tile_config
from fused_dpo.gpu.launch import architecture
from tests.kernels.support.problems import Problem, assert_same_bits, bits_equal, compose, evaluate, make_problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
"""The interpreter multiplies fp32 and fp16 alone, so bf16 is left to GPUs."""
TILE = tile_config(architecture(torch.device(DEVICE)), torch.float32, PLAIN)
LIBRARY = library_config(architecture(torch.device(DEVICE)), torch.float32)
"""Of fp32 problems; those of half precision on a GPU are larger."""


def ordered_matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`np.matmul` with the terms of every element added up from first to last, wherever in the product it stands."""
    out = np.zeros((a.shape[0], b.shape[1]), dtype)
    for k in range(a.shape[1]):
        out += a[:, k, None].astype(dtype) * b[k].astype(dtype)
    return out


def order_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter multiply by `ordered_matmul`.

    For tests that compare bits of a row at other places of a block. A GPU multiplies them alike. OpenBLAS, which NumPy
    takes, does so with AVX512, but on AVX2 it adds up some rows of a block in another order than the rest.
    """
    monkeypatch.setattr(np, "matmul", ordered_matmul)


def on_device(problem: Problem) -> Problem:
    offsets = None if problem.cu_seqlens is None else problem.cu_seqlens.to(DEVICE)
    moved = problem.map(lambda tensor: tensor.to(DEVICE))
    return replace(moved, labels=problem.labels.to(DEVICE), cu_seqlens=offsets)


def assert_invariant(logps: Callable[[Problem], Tensor], **settings: Any) -> None:
    """A sequence's bits depend on the sequence alone; gradients' bits on nothing but the inputs."""
    problem = on_device(make_problem((5, 40, 1, 23), D=33, **settings).to(torch.float32))
    first, again = evaluate(logps, problem), evaluate(logps, problem)
    assert_same_bits(first, again, "the second run")
    with torch.no_grad():
        assert bits_equal(logps(problem), first.logps), "without gradient"
    others = replace(problem, hidden=torch.where(torch.arange(69, device=DEVICE)[:, None] < 45, problem.hidden, 1.0))
    assert bits_equal(logps(others)[:2], first.logps[:2]), "other sequences changed"
    if DEVICE == "cpu":
        return  # NumPy's vector loops round by an element's place in the array; a GPU's do not
    for index in range(len(problem.spans)):
        alone = logps(compose(problem, [index]))
        assert bits_equal(alone, first.logps[index : index + 1]), f"sequence {index} alone"
