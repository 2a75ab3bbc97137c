"""Shared set-up of the tests."""

import pytest
import torch

pytest.register_assert_rewrite("tests.kernels.helpers")

# The problems are small, and two threads that wait for each other on a busy machine take thirty times as long (measured).
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same random numbers, alone or in the suite."""
    torch.manual_seed(0)
