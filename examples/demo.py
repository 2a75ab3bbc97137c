"""`make demo`: train a real model on real pairs on this machine, a few minutes on two CPU cores.

    python -m examples.demo [--model DIR_OR_NAME] [--data FILE] [--output DIR] [--max-steps N]

Fetches SmolLM2-135M-Instruct once, measures one training step with and without the fused head, trains with
`fused-dpo train`, and shows held-out accuracy and margin before and after. On a CPU without bf16 units all of it is
computed in float32.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import compute_dtype
from benchmarks.step import compare
from examples.smollm2 import prepare_smollm2

HERE = Path(__file__).parent
WAYS = ("shared", "packed", "padded logits")
"""Steps to measure: the trainer's, the same without prefix sharing, and what trainers usually do."""
PAIRS, SLOTS = 8, 2048
"""Pairs of a step, in the comparison and in the run, and token slots of a forward pass."""


def main() -> int:
    """Run the demo; exit status 0 if the held-out pairs are ranked better than before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or Hugging Face name (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", default=str(HERE / "preferences.jsonl"), help="preference pairs")
    parser.add_argument("--output", default="outputs/demo", help="folder of the run (default: outputs/demo)")
    parser.add_argument("--max-steps", type=int, default=38, help="optimizer steps (default: 38, one epoch)")
    options = parser.parse_args()

    model = options.model
    if model is None:
        print("1. The model: SmolLM2-135M-Instruct (93 MB, fetched and converted once: half a minute)", flush=True)
        try:
            model = str(prepare_smollm2())
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"   {model}\n")
    print("2. One training step, three ways, the same pairs: one to two minutes", flush=True)
    try:
        dtype = compute_dtype("cpu")
    except ValueError as error:  # the environment names no instruction set
        print(error, file=sys.stderr)
        return 1
    rows = {row["implementation"]: row for row in compare(model, options.data, PAIRS, SLOTS, dtype, 1, WAYS)}
    if failed := [row["failed"] for row in rows.values() if "failed" in row]:
        print(failed[0], file=sys.stderr)
        return 1

    logits, ours = rows["padded logits"], rows["shared"]
    # Beside its steps the run scores all pairs with the reference and the held-out ones three times, without gradients.
    minutes = ours["median_s"] * options.max_steps * 1.7 / 60
    print(f"\n3. The run: {options.max_steps} such steps, about {max(minutes, 1):.0f} minutes", flush=True)
    command = ["train", "--model", model, "--data", options.data, "--output", options.output, "--overwrite"]
    command += ["--eval-fraction", "0.1", "--max-steps", str(options.max_steps), "--learning-rate", "5e-6"]
    command += ["--pairs-per-step", str(PAIRS), "--tokens-per-batch", str(SLOTS), "--eval-steps", "19"]
    print(f"   $ fused-dpo {shlex.join(command)}\n", flush=True)
    status = subprocess.run([sys.executable, "-m", "fused_dpo_engine.cli", *command], check=False).returncode
    if status != 0:
        return status

    summary = json.loads(Path(options.output, "summary.json").read_text())
    before, after = summary["eval_before"], summary["eval_after"]
    better = all(after[f"eval_rewards/{name}"] > before[f"eval_rewards/{name}"] for name in ("accuracies", "margins"))
    print(
        f"\n4. Held-out pairs: reward accuracy {before['eval_rewards/accuracies']:.2f} -> "
        f"{after['eval_rewards/accuracies']:.2f}, margin {before['eval_rewards/margins']:.3f} -> "
        f"{after['eval_rewards/margins']:.3f} (0 before training: policy and reference are the same model);\n"
        f"   chosen likelier than rejected per token {before['eval_logps/accuracies']:.2f} -> "
        f"{after['eval_logps/accuracies']:.2f}.\n"
        f"   One step: {ours['median_s']:.1f} s and {ours['extra_mib'] / 1024:.2f} GiB fused and packed, "
        f"{logits['median_s']:.1f} s and {logits['extra_mib'] / 1024:.2f} GiB with padding and full logits.\n"
        f"   Results: {options.output}/model (Hugging Face format), metrics.jsonl, summary.json, "
        f"tensorboard (tensorboard --logdir {options.output}/tensorboard)"
    )
    return 0 if better else 1


if __name__ == "__main__":
    sys.exit(main())
