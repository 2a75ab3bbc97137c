"""What a run writes: its configuration, metrics, summary and models, and what it leaves alone."""

import json
import math
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from fused_dpo_engine.cli import parse
from fused_dpo_engine.commands.train import train
from fused_dpo_engine.training.trainer import Trainer
from tests.engine.support.runs import FIRST_LOSS, FLAT
from tests.engine.support.toys import Run, byte_tokenizer, largest_difference, options, read_weights

DOCUMENTED = {
    "step",
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "learning_rate",
    "grad_norm",
    "head/kept",
    "head/tail",
    "tokens_per_second",
}
"""Metrics of every step that users may rely on."""


class TestFiles:
    @pytest.fixture(scope="class")
    @staticmethod
    def run(tmp_path_factory, toy_settings) -> Run:
        output = tmp_path_factory.mktemp("runs") / "new" / "run"
        settings = {**toy_settings, "output": output, "tensorboard": True, "eval_fraction": 0.25, "eval_steps": 2}
        return Run(output, train(parse("train", options(**settings))))

    def test_what_is_there(self, run):
        names = {path.name for path in run.output.iterdir()}
        assert names == {"config.json", "metrics.jsonl", "summary.json", "tensorboard", "model", "best"}

    def test_config_is_resolved_and_readable_again(self, run):
        path = run.output / "config.json"
        again = parse("train", ["--config", str(path)])
        assert json.loads(json.dumps(again.flat())) == json.loads(path.read_text(encoding="utf-8"))
        assert again.model.device in ("cpu", "cuda")
        assert again.model.dtype == "float32"
        assert again.optimizer.learning_rate == 1e-3
        assert parse("train", ["--config", str(path), "--output", "elsewhere"]).run.output == "elsewhere"

    @pytest.mark.cpu_units
    def test_automatic_choices_are_in_the_config(self, train_tiny):
        run = train_tiny(max_length=None, dtype="auto", device=None, max_steps=1)
        flat = json.loads((run.output / "config.json").read_text(encoding="utf-8"))
        assert flat["max_length"] == 48  # half of tokens_per_batch, as the model has 128 positions
        assert flat["dtype"] in ("float32", "bfloat16")
        assert flat["device"] in ("cpu", "cuda")

    def test_metrics(self, run):
        metrics = run.metrics
        assert [line["step"] for line in metrics] == [1, 2, 3]
        for line in metrics:
            assert line.keys() >= DOCUMENTED
            assert all(math.isfinite(value) for value in line.values())
            assert line["grad_norm"] > 0
            assert line["tokens_per_second"] > 0
            # Means of order 0.1 in fp32.
            assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-6)
        assert run.column("learning_rate") == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])  # no warm-up in three steps
        evaluated = [{name for name in line if name.startswith("eval_")} for line in metrics]
        assert not evaluated[0]
        assert evaluated[1] == evaluated[2] == run.summary.eval_before.keys()
        assert {"eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"} <= evaluated[1]

    def test_first_step_is_exact(self, run):
        first = run.metrics[0]
        assert first["loss"] == FIRST_LOSS
        assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0
        assert run.summary.eval_before["eval_loss"] == FIRST_LOSS
        assert run.summary.eval_before["eval_rewards/margins"] == 0

    def test_summary(self, run):
        summary = json.loads((run.output / "summary.json").read_text(encoding="utf-8"))
        assert summary == run.summary.as_dict()
        assert (summary["steps"], summary["pairs"], summary["stopped"]) == (3, 18, "all steps done")
        assert summary["tokens"] == sum(run.column("tokens"))
        assert summary["eval_after"]["eval_loss"] == run.metrics[-1]["eval_loss"]

    @pytest.mark.parametrize("name", ["model", "best"])
    def test_model_loads_and_has_moved(self, run, tiny_llama, name):
        model: Any = AutoModelForCausalLM.from_pretrained(run.output / name)
        tokenizer = AutoTokenizer.from_pretrained(run.output / name)
        start = read_weights(tiny_llama)
        assert 1e-4 < largest_difference(run.weights(name), start) < 1e-2
        assert tokenizer.chat_template == byte_tokenizer().chat_template
        ids = torch.tensor([tokenizer("is it? ").input_ids])
        assert model(input_ids=ids).logits.isfinite().all()

    def test_tensorboard_shows_the_same_numbers(self, run):
        board = EventAccumulator(str(run.output / "tensorboard"))
        board.Reload()
        tags = board.Tags()["scalars"]
        for tag, name in (("train/loss", "loss"), ("rewards/margins", "rewards/margins"), ("train/grad_norm",) * 2):
            assert tag in tags
            values = board.Scalars(tag)
            assert [event.step for event in values] == [1, 2, 3]
            assert [event.value for event in values] == pytest.approx(run.column(name.removeprefix("train/")))
        assert [event.step for event in board.Scalars("eval/loss")] == [0, 2, 3]
        assert "train/eval_loss" not in tags

    def test_no_tensorboard(self, train_tiny):
        assert not (train_tiny(max_steps=1).output / "tensorboard").exists()


class TestSaving:
    def test_save_steps(self, train_tiny, monkeypatch):
        saved = []
        save = Trainer._save
        monkeypatch.setattr(
            Trainer, "_save", lambda self, name: (saved.append((name, self.summary.steps)), save(self, name))
        )
        train_tiny(max_steps=5, save_steps=2)
        assert saved == [("model", 2), ("model", 4), ("model", 5)]

    def test_overwrite_replaces_the_files_of_the_run_alone(self, train_tiny):
        first = train_tiny(eval_fraction=0.25)
        (first.output / "notes.txt").write_text("mine")
        again = train_tiny(overwrite=True, max_steps=2)
        assert [line["step"] for line in again.metrics] == [1, 2]
        assert not (again.output / "best").exists()
        assert (again.output / "notes.txt").read_text() == "mine"

    def test_a_run_can_go_on_from_its_own_model(self, train_tiny):
        first = train_tiny(**FLAT)
        before = first.weights()
        again = train_tiny(model=first.output / "model", overwrite=True, max_steps=1, **FLAT)
        assert 1e-4 < largest_difference(again.weights(), before) < 3e-3

    def test_a_lora_run_saves_adapters_alone(self, train_tiny):
        run = train_tiny(lora_rank=2)
        weights = run.weights()
        assert weights
        assert all("lora_" in name for name in weights)
        assert AutoTokenizer.from_pretrained(run.output / "model").eos_token == "</s>"
