"""What cannot work is said in one line by the benchmarks' command lines, before anything is measured."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "benchmarks.step": ["--model", "random:llama-tiny"],
    "benchmarks.screens": [],
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


def test_results_of_pytest_that_cannot_be_written(tmp_path: Path) -> None:
    result = run("pytest", "benchmarks/test_head.py", "--collect-only", "-q", "--results", str(tmp_path))
    assert result.returncode == 4
    assert f"argument --results: cannot write {tmp_path}: Is a directory" in result.stderr


def test_trying_leaves_what_is_there(tmp_path: Path) -> None:
    from benchmarks.arguments import out_file, out_folder

    old = tmp_path / "old.json"
    old.write_text("{}")
    assert out_file(str(old)).read_text() == "{}"
    assert not out_file(str(tmp_path / "a" / "new.json")).exists()
    assert not list(out_folder(str(tmp_path / "b")).iterdir())
