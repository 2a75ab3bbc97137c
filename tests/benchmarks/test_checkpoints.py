"""The benchmark of checkpoints runs, and its figures are of what it says."""

import json

from benchmarks import checkpoints
from tests.engine.support.toys import options, toy_rows, write_rows


def test_it_measures_steps_and_checkpoints(tiny_llama, tmp_path, capfd):
    data = write_rows(tmp_path / "toy.jsonl", toy_rows(24))
    more = options(max_length=48, tokens_per_batch=96, dtype="float32", device="cpu")
    given = ["--model", str(tiny_llama), "--data", str(data), "--steps", "3", "--pairs-per-step", "4"]
    assert checkpoints.main([*given, "--out", str(tmp_path / "out.json"), "--folder", str(tmp_path), "--", *more]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    weights = (tiny_llama / "model.safetensors").stat().st_size
    assert 3 * weights < figures["bytes"] < 3 * weights + 2**20, "weights and two means"
    assert figures["checkpoint_over_step"] == figures["checkpoint_s"] / figures["step_s"] > 0
    assert figures["of_a_step_when_every_50"] == figures["checkpoint_over_step"] / 50
    assert figures["bare_write_s"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"toy.jsonl", "out.json"}, "what was written is removed"
    assert "checkpoint_over_step" in capfd.readouterr().out
