"""Evaluation on held-out pairs: the best model, early stopping, and the pairs it takes away."""

import math
from collections.abc import Callable

import pytest

from fused_dpo_engine.training.trainer import Trainer
from tests.engine.support.runs import FLAT
from tests.engine.support.toys import assert_same_weights, toy_rows, write_rows


def swapped(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


class TestEvaluation:
    @pytest.mark.parametrize("metric", ["eval_loss", "eval_rewards/margins"])
    @pytest.mark.parametrize("better", [True, False])
    def test_best_is_the_best_evaluation(self, train_tiny, tmp_path, metric, better):
        """Held-out pairs like the training pairs get better to the end, pairs with the sides swapped only worse."""
        rows = toy_rows(24)
        data = write_rows(tmp_path / "held_out.jsonl", rows if better else swapped(rows))
        run = train_tiny(max_steps=4, eval_data=data, eval_steps=1, best_metric=metric, learning_rate=3e-3, **FLAT)
        values = run.column(metric)
        best = 4 if better else 1
        assert values[best - 1] == (min(values) if metric == "eval_loss" else max(values))
        assert (run.summary.best_step, run.summary.best_value) == (best, values[best - 1])
        assert run.summary.eval_after["eval_loss"] == run.metrics[-1]["eval_loss"]
        alone = train_tiny("alone", max_steps=best, learning_rate=3e-3, **FLAT)
        assert_same_weights(run.weights("best"), alone.weights())

    @pytest.fixture
    def told(self, monkeypatch) -> Callable[..., None]:
        """Evaluations say what they are told to, the one before training first."""

        def tell(*values: float) -> None:
            coming = iter(values)

            def evaluate(_) -> dict[str, float]:
                value = next(coming)
                return {"eval_loss": value, "eval_rewards/accuracies": value, "eval_rewards/margins": value}

            monkeypatch.setattr(Trainer, "evaluate", evaluate)

        return tell

    def test_early_stopping(self, train_tiny, told):
        told(9, 0.6, 0.4, 0.5, 0.4, 0.1)  # a tie is no gain
        settings = {"max_steps": 9, "eval_fraction": 0.25, "eval_steps": 1, **FLAT}
        run = train_tiny(early_stopping_patience=2, **settings)
        assert [line["step"] for line in run.metrics] == [1, 2, 3, 4]
        assert "early stopping" in run.summary.stopped
        assert (run.summary.steps, run.summary.best_step, run.summary.best_value) == (4, 2, 0.4)
        for name, steps in (("best", 2), ("model", 4)):
            told(9, 9)
            alone = train_tiny(f"until {steps}", **{**settings, "max_steps": steps, "eval_steps": 0})
            assert_same_weights(run.weights(name), alone.weights())

    def test_a_gain_resets_patience(self, train_tiny, told):
        told(9, 0.6, 0.7, 0.5, 0.6, 0.4)
        run = train_tiny(max_steps=5, eval_fraction=0.25, eval_steps=1, early_stopping_patience=2)
        assert (run.summary.steps, run.summary.best_step, run.summary.stopped) == (5, 5, "all steps done")

    def test_no_patience_never_stops(self, train_tiny, told):
        told(0, 1, 2, 3, 4)
        run = train_tiny(max_steps=4, eval_fraction=0.25, eval_steps=1)
        assert (run.summary.steps, run.summary.best_step) == (4, 1)

    def test_an_evaluation_without_a_number_is_never_the_best(self, train_tiny, told):
        told(9, math.nan, 0.5, 0.6)
        run = train_tiny(max_steps=3, eval_fraction=0.25, eval_steps=1)
        assert (run.summary.best_step, run.summary.best_value) == (2, 0.5)

    def test_without_held_out_pairs_there_is_no_best(self, train_tiny):
        run = train_tiny()
        assert not (run.output / "best").exists()
        assert run.summary.best_step is None
        assert not any(name.startswith("eval_") for name in run.metrics[-1])

    def test_eval_fraction_takes_pairs_away(self, train_tiny, capfd):
        run = train_tiny(eval_fraction=0.25, pairs_per_step=18, max_steps=1)
        assert run.column("epoch") == [1]  # 18 of 24 are left
        assert "held out: 6 of 24 pairs" in capfd.readouterr().err
