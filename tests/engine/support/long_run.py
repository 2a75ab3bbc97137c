"""A long run of the command in this process, and what the process holds in the course of it."""

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fused_dpo_engine.cli import main
from fused_dpo_engine.training.metrics import MetricsWriter

EVERY = 10
"""Steps between two looks."""


def look() -> dict[str, int]:
    """Count what this process holds: bytes in memory that are no files' pages, open files, threads of any kind."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {
        "memory": 1024 * int(status["RssAnon"].split()[0]),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
    }


def record(arguments: Sequence[str], output: Path, leak: Callable[[int], Any] = lambda _: None) -> None:
    """Run the command, and write what is seen every few steps; `leak(step)` may hold on to something in every step."""
    seen: list[dict[str, int]] = []
    write = MetricsWriter.write

    def looking(self: MetricsWriter, step: int, metrics: Mapping[str, float]) -> None:
        write(self, step, metrics)
        leak(step)
        if step % EVERY == 0:
            seen.append({"step": step, **look()})

    setattr(MetricsWriter, "write", looking)  # noqa: B010, as type checkers mind
    torch.set_num_threads(1)
    assert main(arguments) == 0
    output.write_text(json.dumps(seen), encoding="utf-8")


def leaking(steps: int) -> Callable[[int], None]:
    """Make a `leak` that in so many steps holds on to as much as 4 KB a step in 2,000, a file and a thread every 50."""
    held: list[Any] = []

    def leak(step: int) -> None:
        held.append(torch.ones(1024 * 2000 // steps))
        if step % 50 == 0:
            held.append(open(os.devnull, "rb"))  # noqa: SIM115
            held.append(threading.Thread(target=threading.Event().wait, daemon=True))
            held[-1].start()

    return leak


def growth(seen: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Tell by how much each number grows from the first tenth of the steps, left out, to the end; relative."""
    steps = seen[-1]["step"]
    first, last = steps // 10, steps - steps // 10
    early = [line for line in seen if first < line["step"] <= 2 * first]
    late = [line for line in seen if line["step"] > last]
    medians = {name: [median(line[name] for line in part) for part in (early, late)] for name in early[0]}
    return {name: after / before - 1 for name, (before, after) in medians.items() if name != "step"}
