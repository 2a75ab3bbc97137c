"""Golden runs: fifty steps of a tiny model through the real command, and the same in float64 by plain code.

`python -m tests.engine.support.golden --write` records them anew in tests/data/golden. Without --write it says how far
this environment is from what is recorded.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from fused_dpo_engine.batching.schedule import Schedule
from fused_dpo_engine.cli import main, parse
from fused_dpo_engine.config.options import LossOptions
from fused_dpo_engine.data.pairs import TokenPair
from tests.engine.support.plain_llama import PlainLlama
from tests.engine.support.runs import toy_pairs
from tests.engine.support.toys import (
    byte_tokenizer,
    options,
    read_metrics,
    tiny_config,
    toy_rows,
    write_rows,
)

Curves = dict[str, list[float]]
"""Loss and gradient norm, step by step."""
RECORDS = Path(__file__).parents[2] / "data" / "golden"
STEPS = 50
LORA_ALPHA = 4
HEAD, PEAK = "lm_head.weight", 16
"""Larger in the model "peaked", whose softmax is as a trained one's: of others filtered gradients leave nothing out."""
MASKS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE")
COMMON: dict[str, Any] = {
    "model": "model",
    "max_steps": STEPS,
    "pairs_per_step": 4,
    "tokens_per_batch": 96,
    "max_length": 48,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "adam_epsilon": 1e-4,
    "beta": 0.2,
    "max_grad_norm": 1.0,
    "seed": 3,
    "dtype": "float32",
    "device": "cpu",
    "report_to": "none",
}
PEAKED = {"model": "peaked", "grad_mode": "filtered", "beta": 0.02, "learning_rate": 5e-5}
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid-smoothed-sft": {"label_smoothing": 0.1, "sft_weight": 0.2, "prefix_sharing": False},
    "ipo-padded": {"loss_type": "ipo", "packing": False},
    "lora": {"model": "adapters", "lora_rank": 2, "learning_rate": 1e-3},
    "filtered": PEAKED,
    "bfloat16-filtered": {**PEAKED, "dtype": "bfloat16"},
}
"""What is set beside COMMON: the layouts, two losses, adapters, filtered gradients, and half precision."""


def write_inputs(folder: Path) -> str:
    """Make a model folder, adapters and data, the same with every release of torch and transformers; their digest."""
    write_rows(folder / "toy.jsonl", toy_rows(24))
    model: Any = AutoModelForCausalLM.from_config(tiny_config("llama"))
    draw(model, 0)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    shutil.copytree(folder / "model", folder / "peaked")
    weights = load_file(folder / "model" / "model.safetensors")
    save_file({**weights, HEAD: PEAK * weights[HEAD]}, folder / "peaked" / "model.safetensors", {"format": "pt"})
    model.name_or_path = str(folder / "model")
    adapted: Any = get_peft_model(model, LoraConfig(r=2, lora_alpha=LORA_ALPHA, target_modules="all-linear"))
    draw(adapted, 1)
    adapted.save_pretrained(folder / "adapters")
    seen = hashlib.sha256()
    for file in (folder / "model" / "model.safetensors", folder / "adapters" / "adapter_model.safetensors"):
        for name, weight in sorted(load_file(file).items()):
            seen.update(name.encode() + weight.numpy().tobytes())
    return seen.hexdigest()


@torch.no_grad()
def draw(model: nn.Module, seed: int) -> None:
    """Fill trainable weights with uniform numbers, which are scaled integers: normal ones hang on a CPU's logarithm."""
    random = torch.Generator().manual_seed(seed)
    for _, weight in sorted(model.named_parameters()):
        if weight.requires_grad:
            drawn = 2 * torch.rand(weight.shape, generator=random) - 1
            weight.copy_(drawn / 4 if weight.ndim >= 2 else 1 + drawn / 8)


def arguments(case: str, folder: Path, **changes: Any) -> list[str]:
    """Options of `fused-dpo train` for a case, its inputs and its output in a folder."""
    settings = {"data": folder / "toy.jsonl", "output": folder / case, **COMMON, **CASES[case]}
    settings["model"] = folder / settings["model"]
    return options(**{**settings, **changes})


def run(case: str, folder: Path, output: str | None = None, **changes: Any) -> Curves:
    """Train through the command, into the folder's `output` (by default the case's name) and with some changes."""
    into = folder / (output or case)
    assert main(["train", *arguments(case, folder, output=into, **changes)]) == 0
    return columns(read_metrics(into))


def columns(metrics: Iterable[Mapping[str, float]]) -> Curves:
    """Take loss and gradient norm from the lines of steps."""
    lines = list(metrics)
    return {name: [line[name] for line in lines] for name in ("loss", "grad_norm")}


def oracle(case: str, folder: Path) -> Curves:
    """Take the same steps in float64 by plain code: full logits, one sequence at a time, torch's own AdamW.

    Tokens and the order of pairs are the trainer's.
    """
    config = parse("train", arguments(case, folder))
    lora = config.lora.lora_rank
    base = folder / "model" if lora else Path(config.model.model)
    weights = {name: weight.double() for name, weight in load_file(base / "model.safetensors").items()}
    adapters: dict[str, Tensor] = {}
    if lora:
        of_folder = load_file(folder / "adapters" / "adapter_model.safetensors")
        adapters = {name: weight.double() for name, weight in of_folder.items()}
    trained = [weight.requires_grad_() for _, weight in sorted((adapters or weights).items())]
    model = PlainLlama(weights, adapters, LORA_ALPHA / lora if lora else 0, tiny_config("llama"))
    settings = config.optimizer
    groups = [
        {"params": [weight for weight in trained if weight.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [weight for weight in trained if weight.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, eps=settings.adam_epsilon, foreach=False, fused=False)
    pairs, lines = toy_pairs(), []
    with torch.no_grad():
        reference = [pair_logps(model, pair) for pair in pairs]
    for number, step in enumerate(Schedule(pairs, config.run, config.packing)):
        loss = plain_loss(config.loss, model, [pairs[i] for i in step.indices], [reference[i] for i in step.indices])
        gradients = torch.autograd.grad(loss, trained)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        lines.append({"loss": float(loss), "grad_norm": norm})
        for weight, gradient in zip(trained, gradients, strict=True):
            weight.grad = min(1.0, settings.max_grad_norm / (norm + 1e-6)) * gradient
        warm = STEPS // 10
        factor = (1 + math.cos(math.pi * (number - warm) / (STEPS - warm))) / 2
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * ((number + 1) / warm if number < warm else factor)
        optimizer.step()
    return columns(lines)


def pair_logps(model: PlainLlama, pair: TokenPair) -> Tensor:
    """Log-probs [2] of the two responses."""
    sums = []
    for ids, positions in pair.sides:
        tokens, scored = torch.from_numpy(ids).long(), torch.from_numpy(positions).long()
        logps = model.logits(tokens).log_softmax(-1)
        sums.append(logps[scored - 1, tokens[scored]].sum())
    return torch.stack(sums)


def plain_loss(loss: LossOptions, model: PlainLlama, pairs: Sequence[TokenPair], reference: Sequence[Tensor]) -> Tensor:
    """Write the two losses out: their mean over pairs, and the mean over chosen tokens of the SFT term."""
    terms, chosen = [], torch.zeros((), dtype=torch.float64)
    for pair, frozen in zip(pairs, reference, strict=True):
        logps = pair_logps(model, pair)
        delta = (logps[0] - frozen[0]) - (logps[1] - frozen[1])
        if loss.loss_type == "ipo":
            terms.append((delta - 1 / (2 * loss.beta)) ** 2)
        else:
            smooth = loss.label_smoothing
            terms.append(-(1 - smooth) * logsigmoid(loss.beta * delta) - smooth * logsigmoid(-loss.beta * delta))
        chosen = chosen + logps[0]
    tokens = sum(pair.chosen_length for pair in pairs)
    return torch.stack(terms).mean() - loss.sft_weight * chosen / tokens


def environment() -> dict[str, Any]:
    """Tell what decides about last bits."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.is_file() else []
    of_cpu = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": " ".join(of_cpu.get(name, "") for name in ("vendor_id", "cpu family", "model", "stepping")),
        "units": [unit for unit in of_cpu.get("flags", "").split() if unit.startswith(("avx", "amx", "fma"))],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "masks": {name: os.environ.get(name) for name in MASKS},
        "threads": torch.get_num_threads(),
    }


def difference(got: Sequence[float], expected: Sequence[float]) -> list[float]:
    """Relative, step by step."""
    return [abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True)]


def read_record(case: str) -> dict[str, Any]:
    """What `--write` has written: digest of the weights, environment, curves of the command and in float64."""
    return json.loads((RECORDS / f"{case}.json").read_text(encoding="utf-8"))


def record_all() -> None:
    """Run every case, and write down what comes of it."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        (RECORDS / f"{case}.json").write_text(json.dumps(measure(case), indent=1) + "\n", encoding="utf-8")


def measure(case: str) -> dict[str, Any]:
    """Make the record of a case here and now."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = write_inputs(folder)
        curves = {"run": run(case, folder), "float64": oracle(case, folder)}
    return {"weights": weights, "environment": environment(), **curves}


def compare_all() -> None:
    """Print the largest relative differences from what is recorded, in steps 1, 2 to 10, 11 to 25, 26 to 50."""
    for case in CASES:
        got, recorded = measure(case), read_record(case)
        print(case, "as recorded" if got["weights"] == recorded["weights"] else "FROM OTHER WEIGHTS")
        for name, value in got["environment"].items():
            if (was := recorded["environment"][name]) != value:
                print(f"  {name}: {was} -> {value}")
        for what, against in (("run", "run"), ("run", "float64"), ("float64", "float64")):
            for curve in got[what]:
                off = difference(got[what][curve], recorded[against][curve])
                worst = [max(off[first:last]) for first, last in ((0, 1), (1, 10), (10, 25), (25, STEPS))]
                print(f"  {curve} of {what} against {against}:", *(f"{value:.1e}" for value in worst))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    torch.set_num_threads(1)  # as in the tests
    record_all() if parser.parse_args().write else compare_all()
