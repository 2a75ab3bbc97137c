"""How things are measured: time, the peak of memory, of a CPU's in a process of its own, and the versions used."""

import ctypes
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import metadata
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from fused_dpo.hardware import has_bf16_units, masked_isa

Result = TypeVar("Result")

PACKAGES = ("triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
"""Whose versions a result names, where installed."""


def isolated(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a module-level function in a fresh process: no memory or caches of what ran before."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # imported, not used: as fresh as a spawned process, and there sooner
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {key} in /proc/self/status; memory is measured on Linux only")


def peak_growth_mib(function: Callable[[], Result]) -> tuple[Result, float]:
    """Run `function` and tell by how many MiB the process's resident memory grew at its peak (Linux with glibc)."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and is resident still would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    before = _status_mib("VmRSS")
    result = function()
    return result, _status_mib("VmHWM") - before


def cuda_growth_mib(function: Callable[[], Result]) -> tuple[Result, float]:
    """Run `function` and tell by how many MiB the memory of CUDA's allocator grew at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    return result, (torch.cuda.max_memory_allocated() - before) / 2**20


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """Call `function`; returns its result and the seconds it took."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def seconds_of(function: Callable[[], Any], runs: int = 10, limit: float = 4.0) -> list[float]:
    """Time single calls, as many as `limit` seconds have room for, but three at least.

    On a GPU by device events around calls that follow each other without a pause: after one, a call would begin with
    the device waiting for the host.
    """
    if not torch.cuda.is_available():
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < runs and (time.perf_counter() - started < limit or len(times) < 3):
            times.append(timed(function)[1])
        return times
    first = _event_times(function, 1)[0]
    return _event_times(function, max(3, min(runs, int(limit / first))))


def _event_times(function: Callable[[], Any], runs: int) -> list[float]:
    """Time `runs` calls on the device, after one that covers the host's start."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    function()
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(events)]


def median_seconds(function: Callable[[], Any]) -> float:
    """Take the median time after a warm-up."""
    function()
    return statistics.median(seconds_of(function))


def compute_dtype(device: str) -> str:
    """Name the dtype that a device multiplies fastest: bfloat16 where it has units for it, else float32.

    Raises:
        ValueError: as `has_bf16_units`.
    """
    return "bfloat16" if has_bf16_units(torch.device(device)) else "float32"


def console() -> Any:
    """Open the console that tables are printed on: as wide as the terminal, and wide enough where there is none."""
    from rich.console import Console

    screen = Console()
    return screen if screen.is_terminal else Console(width=120)


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Compute median, 20th and 80th percentile of repeated runs, as a row holds them."""
    ordered = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    median, p20, p80 = ordered.tolist()
    return {"median_s": median, "p20_s": p20, "p80_s": p80, "rounds": len(seconds)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:  # no git here
        return "unknown"


def cpu_features() -> str:
    """Name the instruction sets of the CPU that decide about the speed of products, and what hides some of them."""
    has = torch.cpu
    features = {
        "AVX2": has._is_avx2_supported(),
        "AVX512": has._is_avx512_supported(),
        "AVX512-BF16": has._is_avx512_bf16_supported(),
        "AMX": has._is_amx_tile_supported(),
    }
    variable, isa = masked_isa()
    hidden = "" if isa == "DEFAULT" else f"; {variable}={isa}"
    return (", ".join(name for name, there in features.items() if there) or platform.machine()) + hidden


@cache
def environment() -> dict[str, Any]:
    """Describe device, versions and commit that a result belongs to; FUSED_DPO_COMMIT names the commit elsewhere."""
    cuda = torch.cuda.is_available()
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": os.environ.get("FUSED_DPO_COMMIT") or _commit(),
        **({"cuda": torch.version.cuda} if cuda else {"cpu_features": cpu_features()}),
        **{name: version for name, version in versions.items() if version},
    }
