"""Shared set-up of the tests."""

import os
from pathlib import Path

import pytest
import torch

from fused_dpo.hardware import tag_compiled_code

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.register_assert_rewrite("tests.kernels", "tests.engine")  # assertions in helpers show their values as well

# A run with some of the CPU's units masked must not take code that one with all of them left; nor do its subprocesses.
tag_compiled_code()
os.environ["TORCH_COMPILE_CACHE_KEY_TAG"] = torch.compiler.config.cache_key_tag

# The problems are small, and two threads waiting for each other on a busy machine take thirty times as long (measured).
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of subprocesses


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same random numbers, alone or in the suite."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; nobody writes into it."""
    from tests.engine.support.toys import save_folder

    return save_folder(tmp_path_factory.mktemp("models") / "llama")
