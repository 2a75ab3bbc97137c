"""What a checkpoint costs: time of a step, of a checkpoint, and of writing as many bytes at all, in one run.

    python -m benchmarks.checkpoints --model DIR --data FILE [--steps 4] [--pairs-per-step 16] [--out FILE.json]
                                     [-- further options of `fused-dpo train`]

A checkpoint is written after every step but the last. The same number of zero bytes is then written to the same disk
and waited for, as the disk alone decides about most of it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.arguments import out_file, positive_int
from benchmarks.measure import console, environment
from fused_dpo_engine.cli import parse
from fused_dpo_engine.commands.train import train
from fused_dpo_engine.training.keeper import Keeper

EVERY = 50
"""Steps from one checkpoint to the next, in the last figure."""


def measure(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Train with a checkpoint after every step; times in seconds, medians of all but the first step."""
    keep, seconds = Keeper.keep, []

    def timed(self: Keeper, *more: Any) -> None:
        began = time.perf_counter()
        keep(self, *more)
        seconds.append(time.perf_counter() - began)

    with patch.object(Keeper, "keep", timed):
        train(parse("train", [*arguments, "--output", str(folder), "--checkpoint-every", "1"]))
    newest = max((folder / "checkpoints").iterdir())
    size = sum(path.stat().st_size for path in newest.iterdir())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    step = statistics.median(line["seconds"] for line in metrics[1:])
    checkpoint = statistics.median(seconds)
    return {
        "step_s": step,
        "checkpoint_s": checkpoint,
        "bytes": size,
        "bare_write_s": bare_write(folder / "bare", size),
        "checkpoint_over_step": checkpoint / step,
        f"of_a_step_when_every_{EVERY}": checkpoint / step / EVERY,
    }


def bare_write(path: Path, size: int) -> float:
    """Write zero bytes and wait until they are on the disk; seconds."""
    block = bytes(1 << 24)
    began = time.perf_counter()
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face name of the model")
    parser.add_argument("--data", required=True, help="preference pairs, as `fused-dpo train` takes them")
    parser.add_argument("--steps", type=positive_int, default=4, help="optimizer steps, at least 3 (default: 4)")
    parser.add_argument("--pairs-per-step", type=positive_int, default=16, help="pairs a step (default: 16)")
    parser.add_argument("--folder", type=Path, help="where to write; by default where temporary files go")
    parser.add_argument("--out", type=out_file, help="write the figures as JSON")
    parser.add_argument("more", nargs="*", help="after --: further options of `fused-dpo train`")
    options = parser.parse_args(arguments)
    given = ["--model", options.model, "--data", options.data, "--max-steps", str(max(3, options.steps))]
    given += ["--pairs-per-step", str(options.pairs_per_step), "--report-to", "none", *options.more]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(given, Path(folder) / "run")
    console().print_json(json.dumps(figures))
    if options.out:
        names = {"model": Path(options.model).name, "data": Path(options.data).name, "options": options.more}
        record = {**environment(), **names, **figures}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
