"""Benchmarks: time, memory and error, each implementation in a process of its own.

They measure the checkout that they lie in, installed or not: a machine with a GPU may have torch and triton alone.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("kernels", "engine")]
