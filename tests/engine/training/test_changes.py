"""Runs that would go on as other runs: refused with what has changed, or warned of rounding."""

import shutil
from collections.abc import Callable

import pytest
import torch

from fused_dpo_engine.config.changes import BY_CONTENT, FREE, PASSES, ROUNDING, changed
from fused_dpo_engine.errors import UserError
from tests.engine.support.toys import Run, flip, options, toy_rows, write_rows


class TestAnotherRun:
    @pytest.fixture
    def begun(self, train_tiny, cut) -> Callable[..., Run]:
        """A run of four steps, cut off; goes on with other settings."""
        settings = {"max_steps": 4, "checkpoint_every": 2}
        with cut(4):
            train_tiny("run", **settings)
        return lambda **changes: train_tiny("run", **{**settings, "resume": "auto", **changes})

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"learning_rate": 2e-3}, "--learning-rate: 0.001, is now 0.002"),
            ({"beta": 0.2, "max_steps": 5}, "--beta: 0.1, is now 0.2; --max-steps: 4, is now 5"),
            ({"seed": 1}, "--seed: 0, is now 1"),
            ({"lora_rank": 2}, "--lora-rank: 0, is now 2"),
            ({"eval_fraction": 0.25}, "the held-out pairs are others"),
            ({"max_length": 20}, "the pairs of --data are others"),
        ],
        ids=str,
    )
    def test_settings(self, begun, change, named):
        with pytest.raises(UserError) as caught:
            begun(**change)
        assert named in str(caught.value)

    def test_a_changed_row(self, begun, tmp_path):
        rows = toy_rows(24)
        rows[7]["chosen"] += "!"
        with pytest.raises(UserError, match="the pairs of --data are others"):
            begun(data=write_rows(tmp_path / "other.jsonl", rows))

    def test_rows_in_another_order(self, begun, tmp_path):
        with pytest.raises(UserError, match="the pairs of --data are others"):
            begun(data=write_rows(tmp_path / "other.jsonl", toy_rows(24)[::-1]))

    def test_a_changed_model(self, begun, tiny_llama, tmp_path):
        other = shutil.copytree(tiny_llama, tmp_path / "other")
        flip(other / "model.safetensors")
        with pytest.raises(UserError, match="the weights of --model are others"):
            begun(model=other)

    def test_the_same_elsewhere(self, begun, tiny_llama, toy_data, tmp_path):
        """Another place of the same model and pairs is no change."""
        data = shutil.copy(toy_data, tmp_path / "moved.jsonl")
        assert begun(model=shutil.copytree(tiny_llama, tmp_path / "moved"), data=data).metrics[-1]["step"] == 4

    def test_rounding_alone_is_said(self, begun, capfd):
        run = begun(tokens_per_batch=128, gradient_checkpointing=True)
        assert run.metrics[-1]["step"] == 4
        told = capfd.readouterr().err
        assert "results will differ in their rounding" in told
        assert "--gradient-checkpointing: False, is now True; --tokens-per-batch: 96, is now 128" in told

    def test_another_device_is_said(self, begun, capfd, monkeypatch):
        from fused_dpo_engine.training import resume

        here = resume.environment
        monkeypatch.setattr(resume, "environment", lambda config: {**here(config), "torch": "9.9"})
        begun()
        assert f"torch {torch.__version__}, now 9.9" in capfd.readouterr().err

    def test_an_unchanged_run_says_nothing_of_rounding(self, begun, capfd):
        begun()
        told = capfd.readouterr().err
        assert "going on after step 2" in told
        assert "rounding" not in told

    def test_every_option_is_known(self, toy_settings):
        """A table that names an option which there is none of any more would let a change pass."""
        from fused_dpo_engine.cli import parse

        flat = parse("train", options(**toy_settings, output="x")).flat()
        assert flat.keys() >= FREE | BY_CONTENT | ROUNDING
        assert not FREE & BY_CONTENT
        assert not (FREE | BY_CONTENT) & ROUNDING
        assert PASSES <= ROUNDING

    @pytest.mark.parametrize("settings", [{"loss_type": "aot"}, {"batches_per_step": 2}], ids=str)
    def test_passes_are_a_matter_of_rounding_only_where_they_are(self, settings):
        before = {"tokens_per_batch": 8, "loss_type": "sigmoid", "batches_per_step": None}
        now = {**before, "tokens_per_batch": 16}
        assert changed(before, now) == ([], ["--tokens-per-batch: 8, is now 16"])
        assert changed({**before, **settings}, {**now, **settings}) == (["--tokens-per-batch: 8, is now 16"], [])
