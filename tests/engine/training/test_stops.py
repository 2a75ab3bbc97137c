"""Runs that end early: divergence and interruption leave the last good model and say what happened."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fused_dpo_engine.errors import OutOfMemoryError, TrainingDivergedError
from tests.engine.support.runs import FLAT, toy_steps, training_forward, without_clock
from tests.engine.support.toys import Run, assert_same_weights, read_metrics, read_weights


def second_step_pair() -> int:
    """A pair that the second step of the toy run sees first."""
    return toy_steps(2)[1][0]


class TestDivergence:
    def check(self, train_tiny: Callable[..., Run], tmp_path: Path, **settings: Any) -> str:
        """The error's message, after the checks that hold for every divergence in step 2."""
        with pytest.raises(TrainingDivergedError, match="step 2: ") as caught:
            train_tiny("diverged", **{**FLAT, **settings})
        output = tmp_path / "diverged"
        assert str(output / "model") in str(caught.value)
        assert [line["step"] for line in read_metrics(output)] == [1]
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        assert (summary["steps"], summary["stopped"]) == (1, "diverged at step 2")
        AutoModelForCausalLM.from_pretrained(output / "model")
        return str(caught.value)

    def test_one_bad_pair_is_named(self, train_tiny, tmp_path, toy_data, monkeypatch):
        bad = second_step_pair()

        def poison(_, batch, logps):
            if bad not in batch.pair_indices:
                return logps
            row = torch.arange(len(logps)) == 2 * batch.pair_indices.index(bad)
            return logps.masked_fill(row, math.nan)

        with monkeypatch.context() as patch:
            training_forward(patch, poison)
            message = self.check(train_tiny, tmp_path)
        assert f"in pairs {toy_data}:{bad + 1}." in message
        last_good = train_tiny("good", max_steps=1, **FLAT)
        assert_same_weights(read_weights(tmp_path / "diverged" / "model"), last_good.weights())

    def test_a_bad_gradient_alone(self, train_tiny, tmp_path, monkeypatch):
        def poison(_, batch, logps):
            if second_step_pair() in batch.pair_indices:
                logps.register_hook(lambda gradient: gradient * math.nan)
            return logps

        with monkeypatch.context() as patch:
            training_forward(patch, poison)
            message = self.check(train_tiny, tmp_path)
        assert "in the gradient alone" in message
        last_good = train_tiny("good", max_steps=1, **FLAT)
        assert_same_weights(read_weights(tmp_path / "diverged" / "model"), last_good.weights())

    def test_a_learning_rate_far_too_high(self, train_tiny, tmp_path, toy_data):
        message = self.check(train_tiny, tmp_path, learning_rate=1e30)
        assert f"{toy_data}:" in message
        assert "and 4 more" not in message  # six pairs fit on the line
        assert all(tensor.isfinite().all() for tensor in read_weights(tmp_path / "diverged" / "model").values())

    @pytest.mark.parametrize("settings", [{"adam_epsilon": 0.0}, {"learning_rate": math.inf}], ids=str)
    def test_an_update_that_breaks_the_weights(self, train_tiny, tmp_path, settings):
        """Refused as a setting, before anything is written."""
        with pytest.raises(SystemExit) as caught:
            train_tiny("broken", **{**FLAT, **settings})
        assert caught.value.code == 2
        assert not (tmp_path / "broken").exists()


class TestInterruption:
    def test_inside_a_step(self, train_tiny, tmp_path, monkeypatch):
        """Ctrl-C between two micro-batches of step 3 leaves the weights of step 2."""
        whole = train_tiny("whole", max_steps=2, **FLAT)
        calls = 0

        def interrupt(_, __, logps):
            nonlocal calls
            calls += 1
            if calls == sum(whole.column("micro_batches")) + 2:
                raise KeyboardInterrupt
            return logps

        training_forward(monkeypatch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_tiny("interrupted", max_steps=9, **FLAT)
        output = tmp_path / "interrupted"
        assert without_clock(read_metrics(output)) == without_clock(whole.metrics)
        assert_same_weights(read_weights(output / "model"), whole.weights())
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        assert (summary["steps"], summary["stopped"]) == (2, "interrupted")

    def test_an_error(self, train_tiny, tmp_path, monkeypatch):
        """As when memory runs out: the summary says what it was, and model/ holds the last whole step."""

        def fail(*_):
            raise MemoryError

        training_forward(monkeypatch, fail)
        with pytest.raises(OutOfMemoryError, match="an allocation failed"):
            train_tiny("failed")
        summary = json.loads((tmp_path / "failed" / "summary.json").read_text(encoding="utf-8"))
        assert (summary["steps"], summary["stopped"]) == (0, "failed: OutOfMemoryError")
        assert (tmp_path / "failed" / "model").is_dir()
