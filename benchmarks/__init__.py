"""Benchmarks: time, memory and error of heads and whole steps, ours and others'.

Heads are timed in one process, one after the other. On a CPU, memory is measured and a step is checked in processes of
their own, as freed memory stays with a process; on a GPU, CUDA's allocator knows it.

They measure the checkout that they lie in, installed or not: a machine with a GPU may have torch and triton alone.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("kernels", "engine")]
