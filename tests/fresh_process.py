"""Python in a process of its own, for what importing does and for what is asked once a process."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, cwd: Path | None = None, variables: Mapping[str, str] = MappingProxyType({})) -> str:
    """Run code that finds the packages by their source roots, with more environment variables; what it prints."""
    roots = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "engine")])
    environment = {**os.environ, "PYTHONPATH": roots, **variables}
    process = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def run_module(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a module on one thread, and wait for its end, whatever it is."""
    roots = os.pathsep.join(str(ROOT / part) for part in ("kernels", "engine", ""))
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": roots, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def run_ranks(ranks: int, module: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Start a module on some ranks by torchrun, each on one thread, and wait for their end, whatever it is."""
    roots = os.pathsep.join(str(ROOT / part) for part in ("kernels", "engine", ""))
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module]
    return subprocess.run(
        [sys.executable, *launch, *map(str, arguments)],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": roots, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


_OF_RANKS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def hide(*modules: str) -> str:
    """Code after which these modules cannot be imported, as if they were not installed."""
    return f"import sys\nsys.modules.update(dict.fromkeys({modules!r}))\n"
