"""Runs that end early: divergence and interruption leave the last good model and say what happened."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fused_dpo_engine.errors import OutOfMemoryError, TrainingDivergedError, UserError
from fused_dpo_engine.training.trainer import Trainer
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

    @pytest.mark.parametrize(("value", "loss"), [(math.nan, "loss nan"), (-math.inf, "loss inf")])
    def test_one_bad_pair_is_named(self, train_tiny, tmp_path, toy_data, monkeypatch, value, loss):
        bad = second_step_pair()

        def poison(_, batch, logps):
            if bad not in batch.pair_indices:
                return logps
            row = torch.arange(len(logps)) == 2 * batch.pair_indices.index(bad)
            return logps.masked_fill(row, value)  # whose gradient is 0

        with monkeypatch.context() as patch:
            training_forward(patch, poison)
            message = self.check(train_tiny, tmp_path)
        assert f"in pairs {toy_data}:{bad + 1}." in message
        assert loss in message
        last_good = train_tiny("good", max_steps=1, **FLAT)
        assert_same_weights(read_weights(tmp_path / "diverged" / "model"), last_good.weights())

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_bad_gradient_alone(self, train_tiny, tmp_path, monkeypatch, value):
        def poison(_, batch, logps):
            if second_step_pair() in batch.pair_indices:
                logps.register_hook(lambda gradient: gradient * value)
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


@pytest.fixture
def break_a_weight(monkeypatch) -> Callable[..., None]:
    """Let a step leave a number in the last row of the embeddings, an id that no pair has, or in a norm."""

    def break_it(at: int, value: float, *, used: bool) -> None:
        take = Trainer._step

        def step(self: Trainer, number: int, *more: Any) -> dict[str, float]:
            metrics = take(self, number, *more)
            if number == at:
                model = self.policy.causal_lm
                weight = model.model.norm.weight if used else model.get_input_embeddings().weight
                with torch.no_grad():
                    weight[-1] = value
            return metrics

        monkeypatch.setattr(Trainer, "_step", step)

    return break_it


class TestBrokenWeights:
    """Weights that an update has left without numbers are never saved, and nobody is told that they are good."""

    def summary(self, output: Path) -> dict[str, Any]:
        return json.loads((output / "summary.json").read_text(encoding="utf-8"))

    @pytest.mark.parametrize("settings", [{"learning_rate": 1e39}, {"weight_decay": 1e300}], ids=str)
    def test_settings_that_break_them(self, train_tiny, tmp_path, settings):
        with pytest.raises(TrainingDivergedError, match=r"step 1: after its update numbers of model\.") as raised:
            train_tiny(**{**FLAT, **settings})
        assert "nor were any before them (--save-steps)" in str(raised.value)
        assert not (tmp_path / "run" / "model").exists()
        assert self.summary(tmp_path / "run")["stopped"] == "diverged at step 1"

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("used", [False, True], ids=["where no loss shows it", "where the next loss does"])
    def test_model_stays_as_it_was_saved_last(self, train_tiny, tmp_path, break_a_weight, value, used):
        good, found = train_tiny("good", max_steps=2, **FLAT), 3 if used else 4
        break_a_weight(3, value, used=used)
        with pytest.raises(TrainingDivergedError, match=f"step {found}: after its update") as raised:
            train_tiny("broken", max_steps=6, save_steps=2, **FLAT)
        output = tmp_path / "broken"
        assert f"{output / 'model'} has the weights after step 2" in str(raised.value)
        assert ("norm.weight" if used else "embed_tokens.weight") in str(raised.value)
        assert_same_weights(read_weights(output / "model"), good.weights())
        assert (self.summary(output)["stopped"], self.summary(output)["steps"]) == (f"diverged at step {found}", found)

    def test_in_the_last_step(self, train_tiny, tmp_path, break_a_weight):
        break_a_weight(3, math.nan, used=True)
        with pytest.raises(TrainingDivergedError, match="step 3: after its update"):
            train_tiny(**FLAT)
        assert not (tmp_path / "run" / "model").exists()
        assert "is not finite" in self.summary(tmp_path / "run")["saved"]["model"]

    def test_as_the_best(self, train_tiny, tmp_path, break_a_weight):
        break_a_weight(2, math.inf, used=False)
        with pytest.raises(TrainingDivergedError, match="step 2: after its update"):
            train_tiny(eval_fraction=0.25, eval_steps=2, **FLAT)
        assert not any((tmp_path / "run" / name).exists() for name in ("model", "best"))

    def test_an_interruption_stays_one(self, train_tiny, tmp_path, monkeypatch, break_a_weight):
        break_a_weight(2, math.inf, used=False)
        calls = []

        def interrupt(_, batch, logps):
            calls.append(batch)
            if len(calls) > 5:
                raise KeyboardInterrupt
            return logps

        training_forward(monkeypatch, interrupt)
        with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="after its update"):
            train_tiny(max_steps=9, **FLAT)
        assert self.summary(tmp_path / "run")["stopped"] == "interrupted"
        assert not (tmp_path / "run" / "model").exists()


class TestBrokenModel:
    """A model folder with weights that are no numbers."""

    @pytest.mark.parametrize("settings", [{}, {"loss_type": "simpo"}, {"lora_rank": 2}], ids=str)
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_is_refused_by_name(self, train_tiny, tmp_path, tiny_llama, settings, value):
        model = shutil.copytree(tiny_llama, tmp_path / "model")
        weights = read_weights(model)
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"the weight .*layers\.1\.mlp\.up_proj.* not finite"):
            train_tiny(model=model, **settings)
        assert not (tmp_path / "run").exists()

    def test_adapters(self, train_tiny, tmp_path):
        adapters = train_tiny("adapters", lora_rank=2).output / "model"
        weights = read_weights(adapters)
        name = next(name for name in weights if "lora_A" in name)
        weights[name][0, 0] = math.nan
        save_file(weights, adapters / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"the weight .*lora_A.* not finite"):
            train_tiny(model=adapters, lora_rank=2)

    def test_of_the_reference(self, train_tiny, tmp_path, tiny_llama):
        model = shutil.copytree(tiny_llama, tmp_path / "model")
        weights = read_weights(model)
        weights["lm_head.weight"][-1, 0] = math.inf
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"the weight lm_head\.weight holds"):
            train_tiny(ref_model=model)


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
