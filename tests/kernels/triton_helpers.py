"""Where the tests of the Triton kernels run: on a GPU if there is one, else in Triton's interpreter."""

from dataclasses import replace

import torch

from tests.kernels.helpers import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
"""The interpreter multiplies fp32 and fp16 alone, so bf16 is left to GPUs."""


def on_device(problem: Problem) -> Problem:
    offsets = None if problem.cu_seqlens is None else problem.cu_seqlens.to(DEVICE)
    moved = problem.map(lambda tensor: tensor.to(DEVICE))
    return replace(moved, labels=problem.labels.to(DEVICE), cu_seqlens=offsets)
