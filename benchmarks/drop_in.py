"""TRL's DPOTrainer as it is, and with its log-probs by fused_dpo: the same steps, each way in a process of its own.

    python -m benchmarks.drop_in --model DIR --data FILE [--steps 3] [--pairs 4] [--out FILE.json]

TRL 1.16 scores every position, prompts and padding too, where it has no Triton, as on a CPU. TRL 1.15 scores what
counts alone, everywhere, and so does 1.16 on a GPU: "TRL, compact" is 1.16 told that it may.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.arguments import out_file, positive_int
from benchmarks.measure import console, cuda_growth_mib, environment, isolated, peak_growth_mib
from benchmarks.steps.trl import scored_alone

LEARNING_RATE = 5e-6


def trl_as_it_is() -> contextlib.AbstractContextManager[Any]:
    """Leave TRL alone."""
    return contextlib.nullcontext()


def plain() -> contextlib.AbstractContextManager[Any]:
    """Take the log-probs of padded batches."""
    from fused_dpo.integrations.trl import patch_trl

    return patch_trl(packed=False)


def packed() -> contextlib.AbstractContextManager[Any]:
    """Take the log-probs of packed rows."""
    from fused_dpo.integrations.trl import patch_trl

    return patch_trl()


WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "TRL": trl_as_it_is,
    "TRL, compact": scored_alone,
    "fused": plain,
    "fused, packed and shared": packed,
}


def train(way: str, model: str, rows: list[dict[str, Any]], steps: int, pairs: int, device: str) -> dict[str, Any]:
    """Take the steps one way: losses, seconds of the later steps, peak memory, and token slots of all backbones."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.utils.logging import disable_progress_bar
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    from fused_dpo import backbone_of

    disable_progress_bars()
    disable_progress_bar()
    slots = 0
    seconds: list[float] = []

    class Clock(TrainerCallback):
        """Times each step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.start)

    def count(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal slots
        given = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        slots += given.numel() if given.shape[-1] > 8 else 0  # not the comparison of the head, on eight tokens

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    load: Any = AutoModelForCausalLM.from_pretrained
    policy, reference = (load(model, dtype=torch.float32).to(device) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder, WAYS[way]():
        config = DPOConfig(
            folder,
            per_device_train_batch_size=pairs,
            max_steps=steps,
            logging_steps=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            max_length=None,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        dataset = Dataset.from_list(rows)
        trainer: Any = DPOTrainer(
            policy, reference, config, train_dataset=dataset, processing_class=tokenizer, callbacks=[Clock()]
        )
        for each in (policy, reference):
            backbone_of(each).register_forward_pre_hook(count, with_kwargs=True)
        _, peak = (cuda_growth_mib if device == "cuda" else peak_growth_mib)(trainer.train)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "way": way,
        "losses": [entry["loss"] for entry in log],
        "logps/chosen": [entry["logps/chosen"] for entry in log],
        "seconds": seconds,
        "peak_mib": peak,
        "slots": slots,
    }


def report(results: list[dict[str, Any]]) -> None:
    """Print what each way took."""
    table = Table(title="TRL's DPOTrainer: float32 weights, reference beside the policy")
    for column in ("", "seconds a step", "of TRL", "extra memory (MiB)", "token slots", "losses"):
        table.add_column(column, justify="left" if column in ("", "losses") else "right")
    first = _per_step(results[0])
    for result in results:
        took = _per_step(result)
        losses = " ".join(f"{loss:.6f}" for loss in result["losses"])
        table.add_row(
            result["way"],
            f"{took:.2f}",
            f"{took / first:.2f}",
            f"{result['peak_mib']:,.0f}",
            f"{result['slots']:,}",
            losses,
        )
    console().print(table)


def _per_step(result: dict[str, Any]) -> float:
    """Mean of the steps after the first, in which things are set up."""
    later = result["seconds"][1:] or result["seconds"]
    return sum(later) / len(later)


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the steps all ways and report; the exit status."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hugging Face name of the model")
    parser.add_argument("--data", required=True, help="preference pairs in a JSONL file of TRL's format")
    parser.add_argument("--steps", type=positive_int, default=4, help="optimizer steps (default: 4)")
    parser.add_argument("--pairs", type=positive_int, default=4, help="pairs a step (default: 4)")
    parser.add_argument("--out", type=out_file, help="write the results as JSON")
    options = parser.parse_args(arguments)
    lines = Path(options.data).read_text(encoding="utf-8").splitlines()[: options.steps * options.pairs]
    rows = [{name: json.loads(line)[name] for name in ("prompt", "chosen", "rejected")} for line in lines]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = [isolated(train, way, options.model, rows, options.steps, options.pairs, device) for way in WAYS]
    report(results)
    if options.out:
        record = {**environment(), "data": Path(options.data).name, "pairs": options.pairs, "rows": results}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
