"""Training with exact and with filtered gradients of the head: the same pairs, the same seed, loss curves side by side.

    python -m benchmarks.training --model DIR --data FILE [--steps 24] [--pairs-per-step 8] [--out FILE.json]
                                  [-- further options of `fused-dpo train`]

Under bf16 compute a last bit of a weight moves a loss in its third digit. How far is shown by a third run: exact too,
with a smaller workspace, which changes nothing but the order of the head's sums. A run that fails ends them all, with
the exit status of the trainer.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.arguments import fraction, out_file, positive_int
from benchmarks.measure import console, environment

RUNS = {
    "exact": ("--grad-mode", "exact"),
    "other rounding": ("--grad-mode", "exact", "--workspace-mib", "16"),
    "filtered": ("--grad-mode", "filtered"),
}


def train(name: str, arguments: list[str], output: Path) -> dict[str, Any]:
    """Run the trainer once; returns its steps, and its evaluation before and after.

    Raises:
        CalledProcessError: the run failed, and has said why.
    """
    command = [sys.executable, "-m", "fused_dpo_engine.cli", "train", "--output", str(output), *RUNS[name]]
    subprocess.run([*command, *arguments], check=True)
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    kept = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm", "head/kept", "head/tail", "seconds")
    return {
        "steps": [{column: step[column] for column in kept} for step in steps],
        "eval_before": summary["eval_before"],
        "eval_after": summary["eval_after"],
    }


def report(runs: dict[str, Any]) -> None:
    """Print the curves, how far they are apart, and what came of the held-out pairs."""
    table = Table(title="loss of each step, and its gradient's norm")
    for column in ("step", *(f"{column}, {name}" for column in ("loss", "norm") for name in RUNS), "kept"):
        table.add_column(column, justify="right")
    for step, rows in enumerate(zip(*(runs[name]["steps"] for name in RUNS), strict=True), start=1):
        numbers = (f"{row[column]:.4f}" for column in ("loss", "grad_norm") for row in rows)
        table.add_row(str(step), *numbers, f"{rows[-1]['head/kept']:.1%}")
    console().print(table)
    for name in RUNS:
        before, after = (runs[name][when] for when in ("eval_before", "eval_after"))
        losses = [[row["loss"] for row in runs[which]["steps"]] for which in (name, "exact")]
        apart = [abs(a - b) for a, b in zip(*losses, strict=True)]
        console().print(
            f"{name}: steps {sum(apart) / len(apart):.4f} from exact on the mean, {max(apart):.4f} at most; "
            f"mean loss {sum(losses[0]) / len(apart):.4f}; held out: loss {before['eval_loss']:.4f} -> "
            f"{after['eval_loss']:.4f}, accuracy {after['eval_rewards/accuracies']:.3f}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all three and report; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face name of the model")
    parser.add_argument("--data", required=True, help="preference pairs, as `fused-dpo train` takes them")
    parser.add_argument("--steps", type=positive_int, default=24, help="optimizer steps (default: 24)")
    parser.add_argument("--pairs-per-step", type=positive_int, default=8, help="pairs a step (default: 8)")
    parser.add_argument("--eval-fraction", type=fraction, default=0.05, help="share held out (default: 0.05)")
    parser.add_argument("--out", type=out_file, help="write the runs as JSON")
    parser.add_argument("more", nargs="*", help="after --: further options of `fused-dpo train`")
    options = parser.parse_args(arguments)
    common = ["--model", options.model, "--data", options.data, "--max-steps", str(options.steps)]
    common += ["--pairs-per-step", str(options.pairs_per_step), "--eval-fraction", str(options.eval_fraction)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            runs = {name: train(name, common + options.more, Path(folder) / name.replace(" ", "_")) for name in RUNS}
        except subprocess.CalledProcessError as failed:
            print(
                f"a run of the trainer failed with exit status {failed.returncode}; it says why above", file=sys.stderr
            )
            return failed.returncode if failed.returncode > 0 else 1  # below 0 it is a signal's number
    report(runs)
    if options.out:
        record = {**environment(), "data": Path(options.data).name, "options": options.more, "runs": runs}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
