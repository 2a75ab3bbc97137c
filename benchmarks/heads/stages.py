"""Where the time of one call goes: by kernel on a GPU, by kind of operator on a CPU."""

from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.heads.run import HeadRun

CPU_STAGES = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "addr"),
    "exponentials and softmax": ("exp", "expm1", "log", "_softmax", "_log_softmax", "_log_softmax_backward_data"),
    "gathers and scatters": (
        *("index_select", "gather", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy"),
        *("index_fill", "nonzero", "searchsorted"),
    ),
    "reductions": ("sum", "amax", "max", "all", "any", "mean"),
    "copies and casts": ("copy", "fill"),
    "elementwise": (
        *("sub", "add", "mul", "div", "neg", "clamp", "where", "masked_fill", "gt", "ge", "lt", "le", "eq"),
        *("__rshift", "__lshift"),
    ),
}
"""Names of operators, in place or not."""
LIBRARY = ("gemm", "nvjet", "xmma", "cutlass", "splitk")
"""Parts of the names of matrix product kernels of cuBLAS."""
LARGEST = 8
"""Kernels listed by name on a GPU; the rest are `other`."""


def stages(run: HeadRun) -> dict[str, float]:
    """Measure the seconds by stage of one call, after one to warm up, the longest first; `other` is the rest."""
    cuda = run.hidden.is_cuda
    run()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if spent := _microseconds(event, cuda):  # calls of CUDA's runtime take none on the device
            seconds[_gpu_stage(event.key) if cuda else _cpu_stage(event.key)] += spent / 1e6
    rest = seconds.pop("other", 0.0)
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return {**dict(ordered[:LARGEST]), "other": rest + sum(time for _, time in ordered[LARGEST:])}


def _microseconds(event: Any, cuda: bool) -> float:
    return event.self_device_time_total if cuda else event.self_cpu_time_total


def _cpu_stage(key: str) -> str:
    operator = key.removeprefix("aten::").rstrip("_")
    return next((stage for stage, operators in CPU_STAGES.items() if operator in operators), "other")


def _gpu_stage(key: str) -> str:
    if any(part in key.lower() for part in LIBRARY):
        return "library matrix products"
    return key.replace("(anonymous namespace)::", "").split("(")[0].split("<")[0].removeprefix("void ")[:60]


def stages_of(case: str, name: str, run: HeadRun) -> list[dict[str, Any]]:
    """Make rows of a results file, one a stage."""
    seconds = stages(run)
    total = sum(seconds.values())
    which = {"suite": "stages", "case": case, "implementation": name}
    return [
        {"id": f"stages/{case}/{name}/{stage}", **which, "stage": stage, "seconds": time, "share": time / total}
        for stage, time in seconds.items()
    ]
