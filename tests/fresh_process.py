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


def hide(*modules: str) -> str:
    """Code after which these modules cannot be imported, as if they were not installed."""
    return f"import sys\nsys.modules.update(dict.fromkeys({modules!r}))\n"
