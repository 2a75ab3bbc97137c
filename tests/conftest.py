"""Shared set-up of the tests."""

import os

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.register_assert_rewrite("tests.kernels", "tests.engine")  # assertions in helpers show their values as well

# The problems are small, and two threads waiting for each other on a busy machine take thirty times as long (measured).
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same random numbers, alone or in the suite."""
    torch.manual_seed(0)
