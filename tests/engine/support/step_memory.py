"""The peak of a real training step's tensors on this CPU, and what the estimate says of it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from fused_dpo_engine.analysis.memory import MemoryEstimate, estimate_memory, shape_of
from fused_dpo_engine.cli import parse
from fused_dpo_engine.commands.train import train
from fused_dpo_engine.training.trainer import Trainer
from tests.engine.support.toys import options, write_rows
from tests.kernels.support.allocations import MIB, allocations_of

ANSWER = 250
"""Tokens of each answer, a byte each; the prompt has few, so that nearly every row of the head is scored."""


def measure(monkeypatch: Any, model: Path, output: Path, **settings: Any) -> tuple[float, MemoryEstimate]:
    """Take two steps of training, and measure the second.

    Returns:
        Bytes at its peak: weights, optimizer state, and whatever the step allocates.
        The estimate for the tokens that its largest pass has.
    """
    step, found = Trainer._step, []

    def measured(trainer: Any, number: int, planned: Any) -> dict[str, float]:
        if number == 1:
            return step(trainer, number, planned)
        there = [*trainer.policy.parameters(), *trainer.policy.buffers()]
        state = [value for values in trainer.optimizer.state.values() for value in values.values()]
        resident = sum(tensor.nbytes for tensor in [*there, *state] if torch.is_tensor(tensor))
        metrics: list[dict[str, float]] = []
        peak = allocations_of(lambda: metrics.append(step(trainer, number, planned)) or metrics).peak
        tokens = max(batch.slots for batch in planned.batches)
        found.append((resident + peak * MIB, tokens, len(planned.batches) > 1))
        return metrics[0]

    monkeypatch.setattr(Trainer, "_step", measured)
    letters = "abcdefghijklmnop"
    rows = [
        {"prompt": f"{i}: ", "chosen": letters[i] * ANSWER, "rejected": letters[-1 - i] * (ANSWER - 8)}
        for i in range(8)
    ]
    common: dict[str, Any] = {"data": write_rows(output / "rows.jsonl", rows), "output": output / "run", "max_steps": 2}
    common |= {"model": model, "report_to": "none", "device": "cpu", "max_length": 700, "workspace_mib": 1}
    config = parse("train", options(**common, **settings))
    train(config)
    (peak, tokens, accumulates), options_ = found[0], config.model
    shape = shape_of(model.name, AutoConfig.from_pretrained(model), config.lora)
    return peak, estimate_memory(
        shape,
        tokens_per_batch=tokens,
        gradient_checkpointing=options_.gradient_checkpointing,
        optimizer=config.optimizer.optimizer,
        half=options_.dtype == "bfloat16",
        workspace_mib=options_.workspace_mib,
        accumulates=accumulates,
        cuda=False,
    )
