"""Short runs of TRL's own DPOTrainer on toy pairs, with and without our patch; a module of torchrun's too."""

import contextlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fused_dpo.integrations.scoring import Counts
from fused_dpo.integrations.trl import patch_trl

STEPS, PAIRS = 5, 4
"""Optimizer steps of a run, and pairs in each."""
ROUTED = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 2.0, "sliding_window": 8},
    "qwen3_moe": {**ROUTED, "output_router_logits": True, "router_aux_loss_coef": 0.5},
}


class Result(NamedTuple):
    """Holds the metrics, weights and counts of a run."""

    log: list[dict[str, float]]
    """Metrics of each step and evaluation."""
    weights: dict[str, Tensor]
    """Those that were trained."""
    counts: Counts | None


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    from tests.engine.support.toys import byte_tokenizer

    made = byte_tokenizer()
    made.pad_token = made.pad_token or made.eos_token
    return made


def rows(count: int) -> list[dict[str, str]]:
    """Pairs whose letters come in runs: a model that expects the last letter again is right now and then."""
    made = []
    for number in range(count):
        a, b, c = (chr(ord("a") + (number * step + step) % 26) for step in (1, 5, 11))
        prompt = f"{a * 4} {b * (2 + number % 3)}: "
        made.append({"prompt": prompt, "chosen": c * 6 + a * 5 + b, "rejected": c * 3 + b * (2 + number % 5)})
    return made


def build(family: str) -> Any:
    """A model of random weights that expects the last token again, in part."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    config = AutoConfig.for_model(family, **(sizes | FAMILIES[family]))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
        model.get_input_embeddings().weight.mul_(3)
        if not model.config.tie_word_embeddings:
            model.lm_head.weight.add_(model.get_input_embeddings().weight / 3)
    return model


def run(
    family: str = "llama",
    *,
    patch: dict[str, Any] | None = None,
    peft_config: Any = None,
    evaluate: bool = False,
    batch_size: int = PAIRS,
    folder: str | None = None,
    **settings: Any,
) -> Result:
    """Train for a few steps; `patch` has the arguments of `patch_trl`, None is TRL as it is."""
    from datasets import Dataset, disable_progress_bars
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    disable_progress_bars()
    with contextlib.ExitStack() as stack:
        active = None if patch is None else stack.enter_context(patch_trl(**patch))
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)
        config = DPOConfig(
            **{
                "output_dir": folder,
                "per_device_train_batch_size": batch_size,
                "per_device_eval_batch_size": batch_size,
                "max_steps": STEPS,
                "logging_steps": 1,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "constant",
                "gradient_checkpointing": False,
                "eval_strategy": "steps" if evaluate else "no",
                "eval_steps": 2,
                "save_strategy": "no",
                "report_to": [],
                "bf16": False,
                "use_cpu": True,
                "disable_tqdm": True,
                "seed": 0,
                **settings,
            }
        )
        precomputed = config.precompute_ref_log_probs
        model = build(family)
        torch.manual_seed(1)  # of adapters
        trainer: Any = DPOTrainer(
            model=model,
            ref_model=None if peft_config or precomputed else build(family),
            args=config,
            train_dataset=_dataset(Path(folder), STEPS * PAIRS),
            eval_dataset=Dataset.from_list(rows(STEPS * PAIRS + 3)[-3:]) if evaluate else None,
            processing_class=tokenizer(),
            peft_config=peft_config,
        )
        trainer.train()
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        return Result(trainer.state.log_history, weights, active and active.counts)


def _dataset(folder: Path, count: int) -> Any:
    """Pairs in a file, as of those TRL finds again what it stored."""
    from datasets import Dataset

    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)), encoding="utf-8")
    return Dataset.from_json(str(path), cache_dir=str(folder / "cache"))


def worst_weight(got: Result, expected: Result) -> float:
    """Largest relative difference of a tensor."""
    assert got.weights.keys() == expected.weights.keys()
    return max(float((got.weights[n] - w).norm() / w.norm()) for n, w in expected.weights.items() if w.any())


_OF_TIME = ("runtime", "per_second")


def worst_metric(got: Result, expected: Result) -> tuple[float, str]:
    """Largest relative difference of a metric, and its name; what is below 1e-3 counts as that."""
    differences = []
    assert len(got.log) == len(expected.log)
    for mine, true in zip(got.log, expected.log, strict=True):
        assert mine.keys() == true.keys()
        for name, value in true.items():
            if not name.endswith(_OF_TIME):
                differences.append((abs(mine[name] - value) / max(abs(value), 1e-3), name))
    return max(differences)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    result = run(**settings)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save(tuple(result), Path(settings["folder"]) / f"result{rank}.pt")
