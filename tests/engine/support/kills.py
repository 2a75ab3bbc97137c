"""Runs that are killed and go on, each in a fork of a process that has imported everything: seconds each, not ten.

python -m tests.engine.support.kills PLAN.json: `{"cases": [{"options": [...], "kills": [MOMENT, ...]}, ...]}`. Each
case is started as often as it has kills, and once more to its end. A moment is a number of file operations in the
run's folder, `{"operation": 17}`, or of seconds from the start, `{"seconds": 0.4}`.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "shutil.rmtree"}


class Operations:
    """Counts the file operations in a folder, until the process ends, and kills it before one of them."""

    def __init__(self, folder: str, killed_at: int | None) -> None:
        self.folder, self.killed_at, self.count = f"{folder}{os.sep}", killed_at, 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and arguments and self.folder in f"{arguments[0]}{os.sep}":
            self.count += 1
            if self.count == self.killed_at:
                os.kill(os.getpid(), signal.SIGKILL)


class Ended(NamedTuple):
    """How a run has ended."""

    status: int
    """As a shell gives it; negative for a signal."""
    seconds: float
    operations: int
    """File operations in its folder; 0 of one that was killed."""


def start(arguments: list[str], output: str, kill: dict[str, float]) -> Ended:
    """Run `fused-dpo train` in a fork, what it prints into a file beside its folder."""
    from fused_dpo_engine.cli import main

    began = time.monotonic()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        log = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        operations = Operations(output, int(kill["operation"]) if "operation" in kill else None)
        status = 1
        try:
            status = main(["train", *arguments])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(write, str(operations.count).encode())
            os._exit(status)
    os.close(write)
    timer = threading.Timer(kill.get("seconds", 600), lambda: os.kill(child, signal.SIGKILL))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    with os.fdopen(read) as counted:
        return Ended(os.waitstatus_to_exitcode(status), time.monotonic() - began, int(counted.read() or 0))


def run(case: dict[str, Any]) -> list[Ended]:
    """Start a case with each of its kills, then to its end."""
    output = case["output"]
    arguments = [*case["options"], "--output", output, "--resume", "auto"]
    return [start(arguments, output, kill) for kill in (*case["kills"], {})]


def main() -> None:
    """Run all cases of a plan and write their statuses beside it."""
    import torch
    import torch.utils.tensorboard

    import fused_dpo_engine.commands.train  # noqa: F401, before the forks

    torch.set_num_threads(1)
    plan = Path(sys.argv[1])
    cases = json.loads(plan.read_text(encoding="utf-8"))["cases"]
    plan.with_suffix(".out").write_text(json.dumps([run(case) for case in cases]), encoding="utf-8")


if __name__ == "__main__":
    main()
