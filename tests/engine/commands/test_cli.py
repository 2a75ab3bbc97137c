"""The command as a user meets it: exit status and messages, and how it is stopped."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import transformers

from fused_dpo.hardware import has_bf16_units
from fused_dpo.losses import LOSSES
from fused_dpo_engine.cli import main
from fused_dpo_engine.training.trainer import Trainer
from tests.engine.support.runs import FIRST_LOSS
from tests.engine.support.toys import ROOT, options, read_metrics, read_weights


class TestCommands:
    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["env", "--help"]], ids=str)
    def test_usage(self, command, arguments):
        outcome = command(*arguments)
        assert outcome.status == 0
        assert "usage: fused-dpo COMMAND" in outcome.out
        assert re.search(r"^ +train +\w+", outcome.out, re.MULTILINE)
        assert re.search(r"^ +env +\w+", outcome.out, re.MULTILINE)

    @pytest.mark.cpu_units
    def test_env(self, command):
        outcome = command("env")
        assert outcome.status == 0
        lines = dict(line.split("  ", 1) for line in outcome.out.splitlines())
        versions = {name.strip(): value.strip() for name, value in lines.items()}
        assert torch.__version__.startswith(versions["torch"])  # a local tag such as +cu130 may be missing
        assert versions["transformers"] == transformers.__version__
        assert versions["python"] == sys.version.split()[0]

    @pytest.mark.parametrize(
        ("isa", "said"), [("AVX2", "no (ONEDNN_MAX_CPU_ISA=AVX2)"), ("AVX3", "AVX3 names no instruction set; unset it")]
    )
    def test_env_tells_what_hides_a_cpus_units(self, command, monkeypatch, isa, said):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        has_bf16_units.cache_clear()
        try:
            outcome = command("env")
        finally:
            has_bf16_units.cache_clear()
        assert outcome.status == 0
        assert said in outcome.out

    def test_env_takes_no_options(self, command):
        outcome = command("env", "--x")
        assert outcome.status == 2
        assert "fused-dpo: env takes no options, got --x" in outcome.message
        assert outcome.out == ""

    @pytest.mark.parametrize(("name", "hint"), [("tran", "did you mean train?"), ("serve", "usage:")])
    def test_unknown_command(self, command, name, hint):
        outcome = command(name)
        assert outcome.status == 2
        assert f"unknown command {name!r}" in outcome.err
        assert hint in outcome.err

    def test_train_help(self, command):
        outcome = command("train", "--help")
        assert outcome.status == 0
        assert "--learning-rate" in outcome.out
        shown = " ".join(re.sub(r"[│┃]", " ", outcome.out).split())
        assert "0 to less than 0.5" in shown
        assert "from the beginning of the prompt, down to half of max-length" in shown

    def test_train(self, train, tmp_path):
        outcome = train()
        assert outcome.status == 0
        assert "training data" in outcome.err
        assert "24 pairs of 24 rows" in outcome.err
        assert str(tmp_path / "run" / "model") in outcome.message.replace(" ", "")
        assert len(read_metrics(tmp_path / "run")) == 3

    @pytest.mark.parametrize(
        ("loss_type", "tokens_per_batch", "warned"),
        [*[(name, 96, 1) for name, spec in LOSSES.items() if spec.across_pairs], ("aot", 4096, 0), ("sigmoid", 96, 0)],
    )
    def test_losses_that_depend_on_the_split_are_warned_of(self, train, loss_type, tokens_per_batch, warned):
        outcome = train(loss_type=loss_type, tokens_per_batch=tokens_per_batch, max_steps=2)
        assert outcome.status == 0
        said = f"{loss_type} compares the pairs of one forward pass with each other; --tokens-per-batch and packing"
        assert outcome.message.count(said) == warned

    def test_diverged(self, train, tmp_path):
        outcome = train(learning_rate=1e30, lr_scheduler_type="constant", warmup_ratio=0)
        assert outcome.status == 1
        assert "fused-dpo: step 2: loss nan" in outcome.message
        assert str(tmp_path / "run" / "model") in outcome.message
        assert "Traceback" not in outcome.err
        assert (tmp_path / "run" / "model").is_dir()

    def test_interrupted(self, train, tmp_path, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("fused_dpo_engine.training.trainer.Trainer._step", interrupted)
            outcome = train()
        assert outcome.status == 130
        assert outcome.err.rstrip().endswith("fused-dpo: interrupted")
        assert (tmp_path / "run" / "model").is_dir()

    def test_interrupted_while_loading(self, train, tmp_path, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("fused_dpo_engine.commands.train.build_policy", interrupted)
        outcome = train()
        assert outcome.status == 130
        assert not (tmp_path / "run").exists()

    def test_interrupted_while_importing(self, command, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.delitem(sys.modules, "fused_dpo_engine.commands.train")
        monkeypatch.setattr("builtins.__import__", interrupted)
        try:
            status = main(["train"])
        finally:
            monkeypatch.undo()
        assert status == 130

    def test_sigterm_is_an_interruption(self, train, tmp_path, monkeypatch):
        step = Trainer._step

        def terminated(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)

        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(Trainer, "_step", terminated)
        outcome = train()
        assert outcome.status == 130
        assert "fused-dpo: stopping after this step; once more to stop at once" in outcome.err
        assert outcome.err.rstrip().endswith("fused-dpo: interrupted after step 1; --resume auto goes on after step 1")
        summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
        assert summary["stopped"] == "interrupted"
        assert signal.getsignal(signal.SIGTERM) == before

    def test_packages_of_the_trainer_are_missing(self, command, monkeypatch):
        monkeypatch.setitem(sys.modules, "fused_dpo_engine.commands.train", None)
        outcome = command("train")
        assert outcome.status == 2
        assert "pip install 'fused-dpo[train]'" in outcome.err


def test_as_a_process(tiny_llama, toy_settings, tmp_path):
    """As a user runs it, with nothing of this process."""
    config = tmp_path / "settings.yaml"
    config.write_text("learning_rate: 5e-4\npairs-per-step: 4\nseed: 5\n")
    settings = {**toy_settings, "learning_rate": None, "pairs_per_step": None, "output": tmp_path / "run"}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT / "kernels"), str(ROOT / "engine"))),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "fused_dpo_engine", "train", *options(config=config, **settings)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    resolved = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert (resolved["learning_rate"], resolved["pairs_per_step"], resolved["seed"]) == (5e-4, 4, 5)
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert metrics[0]["loss"] == FIRST_LOSS
    weights, start = read_weights(tmp_path / "run" / "model"), read_weights(tiny_llama)
    assert any(not torch.equal(weights[name], start[name]) for name in start)
