"""What a reference store saves, and what it costs: starts of a run with and without it, and look-ups.

    python -m benchmarks.reference_store --model DIR --data FILE [--pairs 100000] [--out FILE.json]
                                         [-- further options of `fused-dpo train`]

Two runs with one store, each in a process of its own that ends where its first step would begin. Seconds are counted
from the call of the command, with the imports of a fresh process beside them. Look-ups are of random pairs, all found,
in a store of a file that has just been written: the keys are computed, and the log-probs put into a tensor.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.arguments import out_file, positive_int
from benchmarks.measure import console, environment
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.reference.kept import Kept

START = """
import sys, time
began = time.perf_counter()
from fused_dpo_engine.cli import main
from fused_dpo_engine.commands import train
from fused_dpo_engine.training.trainer import Trainer

class Started(BaseException):
    pass

def started(self):
    raise Started

Trainer.train = started
called = time.perf_counter()
try:
    sys.exit(main(sys.argv[1:]))
except Started:
    print(f"{called - began} {time.perf_counter() - called}")
"""
TOKENS = 300
"""Of a sequence, of which half are its prompt."""


def time_start(arguments: list[str]) -> dict[str, float]:
    """Start a run, and tell the seconds until its first step.

    Raises:
        CalledProcessError: the run failed, and has said why.
    """
    command = [sys.executable, "-c", START, "train", *arguments]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    imports, start = map(float, finished.stdout.split()[-2:])
    return {"imports_s": imports, "start_s": start}


def random_pairs(count: int) -> list[TokenPair]:
    """Make pairs of random tokens, in which no two sequences are equal."""
    ids = np.random.default_rng(0).integers(50_000, size=(count, 2, TOKENS), dtype=np.int32)
    ids[:, 1, : TOKENS // 2] = ids[:, 0, : TOKENS // 2]
    return [TokenPair(TOKENS // 2, chosen, rejected, f"pair {n}") for n, (chosen, rejected) in enumerate(ids)]


def time_look_up(count: int, folder: Path) -> dict[str, float]:
    """Fill a store with so many pairs, and look all of them up in another connection; seconds."""
    pairs = random_pairs(count)
    settings = {"model": "random", "dtype": "float32"}
    logps = -torch.rand(count, 2)
    seconds: dict[str, float] = {}

    def opened() -> Kept:
        return Kept(str(folder / "look-up.db"), lambda: settings, None, Ranks(), Console(quiet=True))

    kept, started = opened(), time.perf_counter()
    for at in range(0, count, 100):
        kept.keep(pairs, range(count)[at : at + 100], logps[at : at + 100])
    kept.finish()
    seconds["write_s"] = time.perf_counter() - started
    kept, started = opened(), time.perf_counter()
    found = kept.look_up(pairs)
    seconds["look_up_s"] = time.perf_counter() - started
    if not torch.equal(found, logps):
        raise AssertionError("the store gave other log-probs than it was given")
    return seconds


def measure(model: str, data: str, pairs: int, more: list[str]) -> dict[str, Any]:
    """Time both, and give the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        usual = ["--model", model, "--data", data, "--reference-store", str(folder / "store.db"), *more]
        starts = {run: time_start([*usual, "--output", str(folder / run)]) for run in ("first", "second")}
        look_up = {"pairs": pairs, **time_look_up(pairs, folder)}
    ratio = starts["second"]["start_s"] / starts["first"]["start_s"]
    return {**starts, "second_to_first": ratio, "look_up": look_up}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face name")
    parser.add_argument("--data", required=True, help="preference pairs")
    parser.add_argument("--pairs", type=positive_int, default=100_000, help="pairs to look up")
    parser.add_argument("--out", type=out_file, help="JSON file to write")
    parser.add_argument("options", nargs="*", help="of `fused-dpo train`, after --")
    parsed = parser.parse_args(arguments)
    try:
        figures = measure(parsed.model, parsed.data, parsed.pairs, parsed.options)
    except subprocess.CalledProcessError as error:
        console().print(f"a run failed with status {error.returncode}")
        return error.returncode
    text = json.dumps({"environment": environment(), **figures}, indent=1)
    print(text)
    if parsed.out:
        parsed.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
