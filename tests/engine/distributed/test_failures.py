"""What a user sees of a rank that fails: one message, an end within 30 seconds, and the last good model."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fused_dpo_engine.cli import parse
from fused_dpo_engine.commands.train import train
from fused_dpo_engine.distributed.failures import interrupts
from fused_dpo_engine.errors import OutOfMemoryError
from fused_dpo_engine.training.trainer import Trainer
from tests.engine.support.failing_ranks import MESSAGE, moment_of
from tests.engine.support.runs import FLAT
from tests.engine.support.toys import (
    Outcome,
    assert_same_weights,
    largest_difference,
    options,
    read_metrics,
    read_weights,
)
from tests.fresh_process import run_ranks

CLOSE_WEIGHTS = 1e-6
"""As in test_equality."""


class Failed(NamedTuple):
    """A job that has ended, and its folder."""

    finished: subprocess.CompletedProcess[str]
    output: Path
    seconds: float
    """From the failure to the end of the last process."""

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.output / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture
def job(tmp_path: Path, toy_settings: dict[str, Any]) -> Callable[..., Failed]:
    def run(what: str, strategy: str, **settings: Any) -> Failed:
        output = tmp_path / "run"
        common = {**toy_settings, **FLAT, "save_steps": 1, "max_steps": 5000}
        arguments = options(**{**common, "strategy": strategy, "output": output, **settings})
        finished = run_ranks(2, "tests.engine.support.failing_ranks", what, *arguments)
        since = moment_of(output).stat().st_mtime if moment_of(output).exists() else time.time()
        return Failed(finished, output, time.time() - since)

    return run


def check_model(failed: Failed, toy_settings: dict[str, Any], tmp_path: Path) -> None:
    """It is that of the steps that were finished."""
    steps = failed.summary["steps"]
    assert [line["step"] for line in read_metrics(failed.output)] == list(range(1, steps + 1))
    good = {**toy_settings, **FLAT, "max_steps": steps, "output": tmp_path / "good"}
    train(parse("train", options(**good)))
    weights = read_weights(failed.output / "model")
    assert largest_difference(weights, read_weights(tmp_path / "good" / "model")) < CLOSE_WEIGHTS
    assert largest_difference(weights, read_weights(Path(toy_settings["model"]))) > 1e-4
    assert not list(failed.output.glob(".model.*")), "nothing half written"


class TestJobs:
    def test_a_rank_raises(self, job, toy_settings, tmp_path):
        failed = job("raise", "ddp")
        assert failed.finished.returncode == 1
        assert failed.seconds < 30
        assert f"RuntimeError: {MESSAGE}" in failed.finished.stderr
        assert "Connection closed" not in failed.finished.stderr, "what the other rank sees of it"
        assert (failed.summary["steps"], failed.summary["stopped"]) == (1, "failed: RuntimeError")
        check_model(failed, toy_settings, tmp_path)

    def test_a_rank_is_killed(self, job, toy_settings, tmp_path):
        failed = job("kill", "fsdp2")
        assert failed.finished.returncode == 1
        assert failed.seconds < 30
        root_cause = failed.finished.stderr.partition("Root Cause")[2]
        assert "(SIGKILL)" in root_cause
        assert "Connection closed" not in failed.finished.stderr
        check_model(failed, toy_settings, tmp_path)

    def test_the_job_is_stopped(self, job, toy_settings, tmp_path):
        """As by a scheduler: all ranks finish the step, gather the weights, and save."""
        failed = job("stop", "fsdp2", save_steps=0)
        assert failed.seconds < 30
        for once in (
            "fused-dpo: interrupted",
            "training data",
            "2 processes, FSDP2",
            "reference: log-probs of 24 pairs",
        ):
            assert failed.finished.stderr.count(once) == 1, once
        assert failed.summary["stopped"] == "interrupted"
        assert failed.summary["steps"] >= 2
        check_model(failed, toy_settings, tmp_path)

    def test_divergence_is_found_by_all_and_told_once(self, job):
        failed = job("diverge", "fsdp2", learning_rate=1e30)
        assert failed.seconds < 30
        assert failed.finished.stderr.count("fused-dpo: step 2: loss nan") == 1
        assert (failed.summary["steps"], failed.summary["stopped"]) == (1, "diverged at step 2")
        assert failed.summary["saved"]["model"] == "after step 1"

    def test_weights_that_an_update_has_broken_are_not_saved(self, job):
        failed = job("diverge", "fsdp2", learning_rate=1e39)
        assert failed.seconds < 30
        assert failed.finished.stderr.count("fused-dpo: step 1: after its update") == 1
        assert (failed.summary["steps"], failed.summary["stopped"]) == (1, "diverged at step 1")
        assert not (failed.output / "model").exists()

    def test_what_a_user_can_mend_is_told_once(self, job, tmp_path):
        failed = job("", "ddp", data=tmp_path / "nowhere.jsonl")
        message = f"fused-dpo: {tmp_path / 'nowhere.jsonl'}: no such file"
        assert failed.finished.stderr.count(message) == 1
        assert failed.finished.stderr.count("nowhere.jsonl: no such file") == 1
        assert failed.finished.returncode == 1
        assert not failed.output.exists()


class TestOptions:
    @pytest.mark.parametrize("settings", [{"beta": -1}, {"config": "nowhere.yaml"}, {"nonsense": 1}])
    @pytest.mark.parametrize("local_rank", ["0", "1"])
    def test_one_process_of_a_machine_says_what_is_wrong(self, train, monkeypatch, settings, local_rank):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        outcome: Outcome = train(**settings)
        assert outcome.status == 2
        assert bool(outcome.message) == (local_rank == "0")


class TestOneProcess:
    def test_weights_on_the_host_are_saved_too(self, train_tiny, tmp_path, toy_settings, monkeypatch):
        """An error in the middle of a step leaves those of the last whole one, and no process group."""
        step, model = second_step(monkeypatch), toy_settings["model"]
        with pytest.raises(OutOfMemoryError):
            train_tiny(offload=True, **FLAT)
        assert step == [1, 2]
        summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
        assert (summary["steps"], summary["saved"]) == (1, {"model": "after step 1"})
        good, saved = train_tiny("good", max_steps=1, **FLAT).weights(), read_weights(tmp_path / "run" / "model")
        assert_same_weights(saved, good)
        assert largest_difference(saved, read_weights(model)) > 1e-4
        assert not torch.distributed.is_initialized()


def second_step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let memory run out after the forward pass of the second step; the list says which steps have begun."""
    begun: list[int] = []
    step, loss_of = Trainer._step, Trainer._loss_of

    def noted(self: Trainer, number: int, *arguments: Any) -> dict[str, float]:
        begun.append(number)
        return step(self, number, *arguments)

    def full(self: Trainer, *arguments: Any) -> Any:
        if begun[-1] == 2:
            raise MemoryError
        return loss_of(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", noted)
    monkeypatch.setattr(Trainer, "_loss_of", full)
    return begun


class TestInterrupts:
    def test_are_put_off_within_the_block_alone(self):
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert not interrupts.wanted
        try:
            with interrupts.put_off(once=False):
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)
                assert interrupts.wanted
            assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        finally:
            interrupts.wanted = False

    def test_the_second_ends_the_block_at_once(self, capfd):
        try:
            with interrupts.put_off(once=True):
                os.kill(os.getpid(), signal.SIGINT)
                assert interrupts.wanted
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGTERM)
            assert interrupts.insisted
        finally:
            interrupts.wanted = interrupts.insisted = False
        assert capfd.readouterr().err.split() == [
            "fused-dpo:",
            "stopping",
            "after",
            "this",
            "step;",
            "once",
            "more",
            "to",
            "stop",
            "at",
            "once",
        ]

    def test_a_new_run_has_none(self, train_tiny, monkeypatch):
        monkeypatch.setattr(interrupts, "wanted", True)
        assert train_tiny().summary.stopped == "all steps done"
