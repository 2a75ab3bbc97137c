"""The store's benchmark: both runs get to their first step, the second without scoring, and look-ups are checked."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import reference_store
from benchmarks.reference_store import main, random_pairs
from tests.engine.support.toys import toy_rows, write_rows


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs are processes of their own."""
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root / 'kernels'}:{root / 'engine'}:{root}")


def test_it_measures(tiny_llama: Path, tmp_path: Path, capfd: Any) -> None:
    out, data = tmp_path / "out.json", write_rows(tmp_path / "toy.jsonl", toy_rows(24))
    more = ["--max-length", "48", "--tokens-per-batch", "96", "--dtype", "float32", "--device", "cpu"]
    usual = ["--model", str(tiny_llama), "--data", str(data), "--pairs", "300", "--out", str(out)]
    assert main([*usual, "--", *more]) == 0
    said = capfd.readouterr().err
    assert said.count(": 0 of 24 pairs found") == said.count(": 24 of 24 pairs found") == 1
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert figures["second_to_first"] == figures["second"]["start_s"] / figures["first"]["start_s"] > 0
    assert figures["look_up"]["pairs"] == 300
    assert main([*usual, "--", "--no-such-option"]) == 2


def test_no_two_sequences_are_equal() -> None:
    pairs = random_pairs(50)
    assert len({key for pair in pairs for key in pair.keys}) == 100
    assert {pair.prompt_length for pair in pairs} == {reference_store.TOKENS // 2}
