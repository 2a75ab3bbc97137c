"""Where the time of one call goes: by kernel on a GPU, by kind of operator on a CPU."""

from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.head import HeadRun

CPU_STAGES = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "exponentials and softmax": ("exp", "exp_", "log", "log_", "_log_softmax", "_log_softmax_backward_data"),
    "gathers and scatters": ("index_select", "gather", "scatter_add_", "index_add_", "nonzero", "index_fill_"),
    "reductions": ("sum", "amax", "max", "all", "any", "mean"),
    "copies and casts": ("copy_", "fill_"),
    "elementwise": (
        *("sub", "add", "add_", "mul", "mul_", "div", "neg", "clamp", "clamp_", "where", "masked_fill", "masked_fill_"),
        *("gt", "ge", "lt", "le", "eq", "__rshift__", "__lshift__"),
    ),
}
LIBRARY = ("gemm", "nvjet", "xmma", "cutlass", "splitk")
"""Parts of the names of matrix product kernels of cuBLAS."""
LARGEST = 8
"""Kernels listed by name on a GPU; the rest are `other`."""


def stages(run: HeadRun) -> dict[str, float]:
    """Seconds by stage of one call, after one to warm up, the longest first; `other` is the rest."""
    cuda = run.hidden.is_cuda
    run()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        seconds[_gpu_stage(event.key) if cuda else _cpu_stage(event.key)] += _microseconds(event, cuda) / 1e6
    rest = seconds.pop("other", 0.0)
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return {**dict(ordered[:LARGEST]), "other": rest + sum(time for _, time in ordered[LARGEST:])}


def _microseconds(event: Any, cuda: bool) -> float:
    return event.self_device_time_total if cuda else event.self_cpu_time_total


def _cpu_stage(key: str) -> str:
    operator = key.removeprefix("aten::")
    return next((stage for stage, operators in CPU_STAGES.items() if operator in operators), "other")


def _gpu_stage(key: str) -> str:
    if any(part in key.lower() for part in LIBRARY):
        return "library matrix products"
    return key.split("(")[0].split("<")[0].removeprefix("void ")[:60]
