"""Fixtures of the engine's tests: a tiny model folder, toy preferences, and runs on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fused_dpo_engine.cli import main, parse
from fused_dpo_engine.commands.train import train
from tests.engine.support.toys import Outcome, Run, options, toy_rows, write_rows


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs of at most 40 tokens."""
    return write_rows(tmp_path_factory.mktemp("data") / "toy.jsonl", toy_rows(24))


@pytest.fixture(scope="session")
def toy_settings(tiny_llama: Path, toy_data: Path) -> dict[str, Any]:
    """Settings of a run of three steps that takes a fraction of a second; a pair has 20 to 60 tokens."""
    return {
        "model": tiny_llama,
        "data": toy_data,
        "max_steps": 3,
        "pairs_per_step": 6,
        "tokens_per_batch": 96,
        "max_length": 48,
        "learning_rate": 1e-3,
        "dtype": "float32",
        "device": "cpu",
        "report_to": "none",
    }


@pytest.fixture
def train_tiny(tmp_path: Path, toy_settings: dict[str, Any]) -> Callable[..., Run]:
    """Train into `tmp_path / name` with `toy_settings` and the given changes."""

    def run(name: str = "run", **settings: Any) -> Run:
        output = tmp_path / name
        summary = train(parse("train", options(**{**toy_settings, "output": output, **settings})))
        return Run(output, summary)

    return run


@pytest.fixture
def command(capfd) -> Callable[..., Outcome]:
    """Call the command in this process."""

    def call(*arguments: str) -> Outcome:
        capfd.readouterr()
        try:
            status = main(arguments)
        except SystemExit as stop:  # the parser's way of ending --help and unknown options
            status = stop.code
        captured = capfd.readouterr()
        assert isinstance(status, int)
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture(name="train")
def train_command(command, toy_settings, tmp_path) -> Callable[..., Outcome]:
    """`fused-dpo train` with `toy_settings` into `tmp_path / "run"` and the given changes."""
    return lambda *more, **settings: command(
        "train", *options(**{**toy_settings, "output": tmp_path / "run", **settings}), *more
    )
