"""What the tests of whole runs on the toy data share."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_dpo_engine.batching.schedule import Schedule
from fused_dpo_engine.config.options import PackingOptions, RunOptions
from fused_dpo_engine.data.formats import Row
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.data.tokenization import tokenize_pairs
from fused_dpo_engine.model.policy import Policy, SequenceLogps
from tests.engine.support.toys import assert_same_weights, byte_tokenizer, read_metrics, read_weights, toy_rows

LN2 = math.log(2)
FIRST_LOSS = pytest.approx(LN2, abs=5e-7)
"""Of a step whose policy and reference are the same function: a mean in fp32, some units in the last place."""
FLAT = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
"""A course of the learning rate that does not depend on the length of the run."""
CLOCK = ("seconds", "tokens_per_second", "peak_memory_gib")
"""Metrics that differ from run to run."""


def without_clock(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in metrics]


def summary_without_clock(output: Path) -> dict[str, Any]:
    """What a run came to, in its folder."""
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return {name: value for name, value in summary.items() if name not in CLOCK}


def curve_points(output: Path) -> Iterator[tuple[str, int, float | None]]:
    """All points of TensorBoard's curves, in the order of their files; without values where those are of the clock."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for file in sorted((output / "tensorboard").glob("events*")):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                is_clock = value.tag.removeprefix("train/") in CLOCK or value.tag == "settings/text_summary"
                yield value.tag, event.step, None if is_clock else value.simple_value


def assert_same_run(got: Path, expected: Path) -> None:
    """Compare two runs' folders but for the clock, bit for bit: metrics, summary, models, curves."""
    assert without_clock(read_metrics(got)) == without_clock(read_metrics(expected)), got
    assert summary_without_clock(got) == summary_without_clock(expected)
    for name in ("model", "best"):
        assert (got / name).exists() == (expected / name).exists()
        if (expected / name).exists():
            assert_same_weights(read_weights(got / name), read_weights(expected / name))
    assert list(curve_points(got)) == list(curve_points(expected))


def toy_pairs() -> list[TokenPair]:
    """The tokens of the toy data."""
    rows = [Row(values, "toy") for values in toy_rows(24)]
    return tokenize_pairs(rows, byte_tokenizer(), max_length=48).pairs


def toy_steps(steps: int, pairs_per_step: int = 6) -> list[list[int]]:
    """Pair indices of the toy run's steps."""
    run = RunOptions(output="", max_steps=steps, pairs_per_step=pairs_per_step)
    return [step.indices for step in Schedule(toy_pairs(), run, PackingOptions())]


def training_forward(monkeypatch, change: Callable[[Policy, Any, Any], Any]) -> None:
    """Let `change(policy, batch, logps)` have the last word in every forward pass of training."""
    forward = Policy.forward

    def changed(self, batch):
        scores = forward(self, batch)
        if not torch.is_grad_enabled():
            return scores
        logps = change(self, batch, scores.logps)
        return SequenceLogps(logps, logps, scores.head)

    monkeypatch.setattr(Policy, "forward", changed)
