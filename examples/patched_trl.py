"""TRL's DPOTrainer with its log-probs by fused_dpo, packed, prompts shared: patched before the trainer is built.

python -m examples.patched_trl [MODEL [PAIRS.jsonl]]
"""

import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from examples.smollm2 import prepare_smollm2
from fused_dpo.integrations import patch_trl

ON_GPU = torch.cuda.is_available()
PAIRS = str(Path(__file__).parent / "preferences.jsonl")


def main(model: str = "", pairs: str = PAIRS, steps: int = 3) -> list[float]:
    """Train for a few steps of four pairs; returns the losses, and says what was computed."""
    model = model or str(prepare_smollm2())
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder, patch_trl() as patch:
        settings = {"per_device_train_batch_size": 4, "max_steps": steps, "logging_steps": 1, "report_to": "none"}
        config = DPOConfig(folder, bf16=ON_GPU, use_cpu=not ON_GPU, **settings)
        dataset = Dataset.from_json(pairs).select(range(4 * steps))
        trainer = DPOTrainer(policy, args=config, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
    counts = patch.counts
    print(f"{counts.packed_calls} of {counts.calls} forward passes packed, {counts.slots} token slots")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(**dict(zip(("model", "pairs"), sys.argv[1:], strict=False)))
