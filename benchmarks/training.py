"""Training with exact and with filtered gradients of the head: the same pairs, the same seed, loss curves side by side.

python -m benchmarks.training --model DIR --data FILE [--steps 24] [--pairs-per-step 8] [--out FILE.json]
                              [-- further options of `fused-dpo train`]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.measure import console, environment

MODES = ("exact", "filtered")


def train(mode: str, arguments: list[str], output: Path) -> dict[str, Any]:
    """One run of the trainer; its steps, and its evaluation before and after."""
    command = [sys.executable, "-m", "fused_dpo_engine.cli", "train", "--output", str(output), "--grad-mode", mode]
    subprocess.run([*command, *arguments], check=True)
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    kept = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm", "head/kept", "head/tail", "seconds")
    return {
        "steps": [{name: step[name] for name in kept} for step in steps],
        "eval_before": summary["eval_before"],
        "eval_after": summary["eval_after"],
    }


def main() -> None:
    """Run both, print the curves and the held-out pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face name of the model")
    parser.add_argument("--data", required=True, help="preference pairs, as `fused-dpo train` takes them")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps (default: 24)")
    parser.add_argument("--pairs-per-step", type=int, default=8, help="pairs a step (default: 8)")
    parser.add_argument("--eval-fraction", type=float, default=0.05, help="share held out (default: 0.05)")
    parser.add_argument("--out", type=Path, help="write both runs as JSON")
    parser.add_argument("more", nargs="*", help="after --: further options of `fused-dpo train`")
    options = parser.parse_args()
    arguments = ["--model", options.model, "--data", options.data, "--max-steps", str(options.steps)]
    arguments += ["--pairs-per-step", str(options.pairs_per_step), "--eval-fraction", str(options.eval_fraction)]
    with tempfile.TemporaryDirectory() as folder:
        runs = {mode: train(mode, arguments + options.more, Path(folder) / mode) for mode in MODES}

    table = Table(title=f"{Path(options.data).name}, {options.pairs_per_step} pairs a step")
    for column in ("step", *(f"{name}, {mode}" for name in ("loss", "gradient norm") for mode in MODES), "kept"):
        table.add_column(column, justify="right")
    exact, filtered = (runs[mode]["steps"] for mode in MODES)
    for step, (a, b) in enumerate(zip(exact, filtered, strict=True), start=1):
        numbers = (f"{row[name]:.4f}" for name in ("loss", "grad_norm") for row in (a, b))
        table.add_row(str(step), *numbers, f"{b['head/kept']:.1%}")
    console().print(table)
    difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(exact, filtered, strict=True))
    console().print(f"largest difference of the losses: {difference:.2g}")
    for mode in MODES:
        before, after = (runs[mode][name] for name in ("eval_before", "eval_after"))
        accuracy, loss = "eval_rewards/accuracies", "eval_loss"
        console().print(
            f"held out, {mode}: loss {before[loss]:.4f} -> {after[loss]:.4f}, accuracy {after[accuracy]:.3f}"
        )
    if options.out:
        record = {**environment(), "data": Path(options.data).name, "options": options.more, "runs": runs}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
