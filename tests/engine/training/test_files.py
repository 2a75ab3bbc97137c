"""What a run writes: its configuration, metrics, summary and models, and what it leaves alone."""

import errno
import json
import math
import os
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fused_dpo_engine.cli import parse
from fused_dpo_engine.commands.train import train
from fused_dpo_engine.errors import SaveError, TrainingDivergedError, UserError
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
        settings = {
            **toy_settings,
            "output": output,
            "report_to": "tensorboard",
            "eval_fraction": 0.25,
            "eval_steps": 2,
        }
        return Run(output, train(parse("train", options(**settings))))

    def test_what_is_there(self, run):
        names = {path.name for path in run.output.iterdir()}
        assert names == {
            ".fused-dpo-run.json",
            "config.json",
            "metrics.jsonl",
            "summary.json",
            "tensorboard",
            "model",
            "best",
        }

    def test_config_is_resolved_and_readable_again(self, run):
        path = run.output / "config.json"
        with pytest.raises(UserError, match="contains what --config names"):  # this run would lose its settings
            parse("train", ["--config", str(path)])
        again = parse("train", ["--config", str(path), "--output", "elsewhere"])
        written = json.loads(path.read_text(encoding="utf-8"))
        assert json.loads(json.dumps(again.flat())) == {**written, "output": "elsewhere"}
        assert again.model.device in ("cpu", "cuda")
        assert again.model.dtype == "float32"
        assert again.optimizer.learning_rate == 1e-3

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
        assert summary["saved"]["model"] == "after step 3"
        assert summary["saved"]["best"] in ("after step 2", "after step 3")
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
        first = train_tiny(eval_fraction=0.25, report_to="tensorboard")
        notes = [
            first.output / name for name in ("notes.txt", "model/notes.txt", "best/sub/notes.txt", "tensorboard/n")
        ]
        for path in notes:
            path.parent.mkdir(exist_ok=True)
            path.write_text("mine")
        events = set((first.output / "tensorboard").glob("events*"))
        again = train_tiny(overwrite=True, max_steps=2, report_to="tensorboard")
        assert [line["step"] for line in again.metrics] == [1, 2]
        assert {path.name for path in (again.output / "best").rglob("*")} == {"sub", "notes.txt"}
        assert not events & set((again.output / "tensorboard").glob("events*"))
        assert all(path.read_text() == "mine" for path in notes)

    def test_what_no_run_has_written_is_not_overwritten(self, train_tiny, tmp_path):
        """A folder with a file of a run's name, but without its mark: somebody else's."""
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text("{}")
        for overwrite in (False, True):
            with pytest.raises(UserError, match=r"holds config\.json, which no run of fused-dpo has marked as its own"):
                train_tiny(overwrite=overwrite)
        assert (tmp_path / "run" / "config.json").read_text() == "{}"
        assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "config.json"]

    def test_a_run_can_go_on_from_another_ones_model(self, train_tiny):
        first = train_tiny(**FLAT)
        again = train_tiny("again", model=first.output / "model", max_steps=1, **FLAT)
        assert 1e-4 < largest_difference(again.weights(), first.weights()) < 3e-3

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("option", ["model", "ref_model", "data", "eval_data", "chat_template"])
    def test_what_a_run_reads_is_refused_as_its_output(self, train_tiny, option, overwrite):
        """Also below its own earlier output, which --overwrite would remove; before anything is loaded."""
        first = train_tiny(max_steps=1)
        given = first.output / "model" if "model" in option else first.output / "model" / "tokenizer.json"
        before = {path: path.read_bytes() for path in first.output.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match=rf"contains what --{option.replace('_', '-')} names"):
            train_tiny(overwrite=overwrite, **{option: given})
        assert before == {path: path.read_bytes() for path in first.output.rglob("*") if path.is_file()}

    def test_a_config_file_in_the_output_is_refused(self, train_tiny, command):
        first = train_tiny(max_steps=1)
        done = command("train", "--config", str(first.output / "config.json"), "--overwrite")
        assert done.status == 2
        assert "contains what --config names" in " ".join(done.err.split())
        assert (first.output / "model" / "config.json").is_file()

    @pytest.mark.parametrize("saves", [1, 2])
    def test_a_failed_save(self, train_tiny, tmp_path, monkeypatch, saves):
        """A full disk at the first save of model/, or at the second: a message, and the last good files stay."""
        save, calls = LlamaForCausalLM.save_pretrained, []

        def fails(self, folder, **settings):
            calls.append(folder)
            save(self, folder, **settings)
            if len(calls) == saves:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fails)
        with pytest.raises(
            SaveError, match=r"run/model could not be written: No space left on device; free some space"
        ):
            train_tiny(max_steps=3, save_steps=1)
        output = tmp_path / "run"
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        assert (summary["stopped"], summary["steps"]) == ("not saved", saves)
        assert summary["saved"] == {"model": f"failed after step {saves}: No space left on device"}
        assert (output / "model").exists() is (saves == 2)
        assert not [path for path in output.iterdir() if path.name.startswith(".model")]
        if saves == 2:
            AutoModelForCausalLM.from_pretrained(output / "model")

    def test_a_failed_save_does_not_hide_what_went_wrong(self, train_tiny, tmp_path, monkeypatch):
        def fails(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fails)
        with pytest.raises(TrainingDivergedError), pytest.warns(UserWarning, match="No space left on device"):
            train_tiny(learning_rate=1e30, **FLAT)
        summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
        assert summary["stopped"].startswith("diverged")
        assert summary["saved"]["model"].startswith("failed after step")

    def test_a_lora_run_saves_adapters_alone(self, train_tiny):
        run = train_tiny(lora_rank=2)
        weights = run.weights()
        assert weights
        assert all("lora_" in name for name in weights)
        assert AutoTokenizer.from_pretrained(run.output / "model").eos_token == "</s>"
