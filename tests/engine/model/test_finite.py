"""Weights that are no longer numbers, found by name."""

import math

import pytest
import torch

from fused_dpo_engine.model.finite import first_not_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_among_many_is_named(dtype, value):
    weights = {name: torch.randn(65, 33).to(dtype) for name in "abc"}
    assert first_not_finite(weights.items()) is None
    weights["b"][64, 32] = value
    assert first_not_finite(weights.items()) == "b"


def test_the_largest_numbers_of_a_dtype_are_finite():
    for dtype in (torch.float64, torch.bfloat16):
        weight = torch.tensor([torch.finfo(dtype).min, 0], dtype=dtype)
        assert first_not_finite([("a", weight)]) is None


def test_what_is_not_looked_at():
    """Nothing, quantised bytes, and 8-bit floats, which have no such reduction."""
    eight = torch.full((2,), math.nan).to(torch.float8_e4m3fn)
    assert (
        first_not_finite([("none", torch.empty(0)), ("bytes", torch.ones(2, dtype=torch.uint8)), ("fp8", eight)])
        is None
    )
