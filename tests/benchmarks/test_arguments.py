"""What cannot work is said in one line by the benchmarks' command lines, before anything is measured."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import step, training
from benchmarks.arguments import hidden_file, out_file, out_folder
from benchmarks.heads.replay import TENSORS
from tests.benchmarks.command_lines import refusal

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "benchmarks.step": ["--model", "random:llama-tiny"],
    "benchmarks.screens": [],
    "benchmarks.checkpoints": ["--model", "m", "--data", "d"],
    "benchmarks.training": ["--model", "m", "--data", "d"],
    "benchmarks.tuning": [],
    "benchmarks.gpu_suite": ["--interpreter"],
}


def refused(module: str, *arguments: str) -> str:
    """The last line of what a command says that refuses its arguments."""
    result = run(module, *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("module", COMMANDS)
def test_results_that_cannot_be_written(module: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "results")
    assert "argument --out: cannot write" in refused(module, *COMMANDS[module], "--out", out)


def test_small_problems_take_no_real_hidden_states(tmp_path: Path) -> None:
    file = tmp_path / "hidden.safetensors"
    save_file({name: torch.zeros(1) for name in TENSORS}, file)
    message = refused("benchmarks.gpu_suite", "--interpreter", "--out", str(tmp_path), "--hidden", str(file))
    assert "leave out --hidden" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "argument --repeats: must be at least 1, got 0"),
        (["--pairs", "-1"], "argument --pairs: must be at least 1, got -1"),
        (["--pairs", "200"], "hh_helpful has 128 pairs of at most 4096 tokens a sequence, not 200."),
        (["--tokens-per-batch", "0"], "argument --tokens-per-batch: must be at least 1, got 0"),
        (["--tokens-per-batch", "20"], "hh_helpful has 0 pairs of at most 10 tokens a sequence, not 16."),
        (["--data", "nowhere"], "take their lengths from one of hh_helpful, qa_long_prompts, dpo_en, got 'nowhere'."),
        (["--model", "random:x"], "no random model 'x'; there are random:llama-1b, random:llama-tiny."),
        (["--model", "./nowhere"], "model folder ./nowhere does not exist."),
        (["--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_steps_that_cannot_be_taken(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(step, "compare", lambda *_: pytest.fail("measured"))
    assert message in refusal(step.main, ["--model", "random:llama-tiny", *arguments], capsys)


@pytest.mark.parametrize(("failed", "status"), [([True, True], 1), ([True, False], 0)])
def test_status_of_steps(failed: list[bool], status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"failed": "too large"} if bad else {} for bad in failed]
    monkeypatch.setattr(step, "compare", lambda *_: rows)
    assert step.main(["--model", "random:llama-tiny"]) == status


@pytest.mark.parametrize("module", ["benchmarks.tuning", "benchmarks.gpu_suite"])
def test_hidden_states_that_are_not_there(module: str, tmp_path: Path) -> None:
    path = tmp_path / "nothing.safetensors"
    arguments = [*COMMANDS[module], "--out", str(tmp_path / "rows"), "--hidden", str(path)]
    assert f"argument --hidden: {path} is not there" in refused(module, *arguments)


def test_hidden_states_of_pytest_that_are_not_there() -> None:
    result = run("pytest", "benchmarks/test_head.py", "--collect-only", "-q", "--hidden", "nowhere")
    assert result.returncode == 4
    assert "argument --hidden: nowhere is not there" in result.stderr


def test_hidden_states_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"README\.md is no safetensors file"):
        hidden_file(str(ROOT / "README.md"))
    path = tmp_path / "weights.safetensors"
    save_file({"hidden": torch.zeros(2, 3), "target": torch.zeros(2)}, path)
    with pytest.raises(argparse.ArgumentTypeError, match="holds no cu_seqlens, weight_int8, weight_scale"):
        hidden_file(str(path))
    save_file({name: torch.zeros(2, 3) for name in TENSORS}, path)
    assert hidden_file(str(path)) == path
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(argparse.ArgumentTypeError, match="needs the package safetensors"):
        hidden_file(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["--pairs-per-step", "0"], "argument --pairs-per-step: must be at least 1, got 0"),
        (["--eval-fraction", "0"], "argument --eval-fraction: must lie between 0 and 1, got 0"),
        (["--eval-fraction", "2"], "argument --eval-fraction: must lie between 0 and 1, got 2"),
        (["--eval-fraction", "nan"], "argument --eval-fraction: must lie between 0 and 1, got nan"),
    ],
)
def test_training_that_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(training.main, ["--model", "m", "--data", "d", *arguments], capsys)


def test_training_that_fails_says_why_once() -> None:
    result = run("benchmarks.training", "--model", "./nowhere", "--data", "examples/preferences.jsonl")
    said = result.stderr.splitlines()
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert [line for line in said if "model folder ./nowhere does not exist" in line]
    assert said[-1] == "a run of the trainer failed with exit status 2; it says why above"


def test_results_of_pytest_that_cannot_be_written(tmp_path: Path) -> None:
    result = run("pytest", "benchmarks/test_head.py", "--collect-only", "-q", "--results", str(tmp_path))
    assert result.returncode == 4
    assert f"argument --results: cannot write {tmp_path}: Is a directory" in result.stderr


def test_trying_leaves_what_is_there(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("{}")
    assert out_file(str(old)).read_text() == "{}"
    assert not out_file(str(tmp_path / "a" / "new.json")).exists()
    assert not list(out_folder(str(tmp_path / "b")).iterdir())
