"""A suite of parts that may lose the GPU, or hang on it: run in a process of its own, and what is left in another."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RECORD = "gpu_suite.json"
BEGUN = "begun"
"""Status in the record of a part that is running, or was when its process ended."""
HANGING_SECONDS = 150.0
"""No part and no row of one takes so long."""


class DeviceLostError(Exception):
    """Nothing more can be done on the GPU in this process."""


def device_is_lost() -> bool:
    """Tell whether an access out of bounds, or the like, has ended this process's use of the GPU."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return True
    return False


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write the record at once, as another process may read it meanwhile."""
    new = out / f"{RECORD}.new"
    new.write_text(json.dumps(record, indent=2) + "\n")
    new.replace(out / RECORD)


def supervised(command: Sequence[str], out: Path, minutes: float) -> None:
    """Run a suite that keeps its record in `out`, again with what is left whenever it dies or hangs in a part.

    `command` gets the arguments `--minutes` and `--process`, which is `begin` or `resume`.
    """
    (out / RECORD).unlink(missing_ok=True)
    ends, how = time.perf_counter() + 60 * minutes, "begin"
    while True:
        known = len(_entries(out))
        left = max((ends - time.perf_counter()) / 60, 1e-3)
        status = _watched([*command, "--minutes", f"{left:.3f}", "--process", how], out)
        if status == 0:
            return
        if len(_entries(out)) == known:
            raise SystemExit(f"the suite ended with status {status} before any part.")
        _end_what_was_begun(out, status)
        how = "resume"


def _watched(command: Sequence[str], out: Path) -> int:
    """Wait for a process that does not outlive this one, and is killed where it hangs; returns its exit status."""
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if _running(out) and _idle_seconds(out) > HANGING_SECONDS:
                    os.killpg(process.pid, signal.SIGKILL)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode


def _end_what_was_begun(out: Path, status: int) -> None:
    record = json.loads((out / RECORD).read_text())
    for entry in record["parts"].values():
        if entry["status"] == BEGUN:
            entry |= {"status": "failed", "error": f"its process ended with status {status}; -9 if it hung"}
    write_record(out, record)


def _entries(out: Path) -> dict[str, Any]:
    return json.loads((out / RECORD).read_text())["parts"] if (out / RECORD).exists() else {}


def _running(out: Path) -> bool:
    return any(entry["status"] == BEGUN for entry in _entries(out).values())


def _idle_seconds(out: Path) -> float:
    """Tell how long nothing has been written."""
    return time.time() - max(path.stat().st_mtime for path in out.iterdir())
