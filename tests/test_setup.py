"""The set-up that `tests/conftest.py` makes holds in every worker of pytest-xdist."""

import os
import subprocess
import sys

import torch


def test_one_thread():
    """Also in subprocesses; several workers, or a busy machine, would make two threads wait for each other."""
    assert torch.get_num_threads() == 1
    command = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "1"


def test_triton_interprets_without_a_gpu():
    assert (os.environ.get("TRITON_INTERPRET") == "1") is not torch.cuda.is_available()


def test_compiled_code_is_kept_apart_by_the_cpus_units():
    units = torch.backends.cpu.get_cpu_capability()
    assert units in torch.compiler.config.cache_key_tag.split()
    assert units in os.environ["TORCH_COMPILE_CACHE_KEY_TAG"].split()
