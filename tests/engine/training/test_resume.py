"""Runs that are cut off and go on: where they go on, and with the same bits as one that was not cut off."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_dpo_engine.batching.schedule import Schedule
from fused_dpo_engine.config.options import PackingOptions, RunOptions
from fused_dpo_engine.distributed.failures import interrupts
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.training.summary import Summary
from fused_dpo_engine.training.trainer import Trainer
from tests.engine.support.runs import assert_same_run, curve_points, toy_pairs, without_clock
from tests.engine.support.toys import Run, assert_same_weights


@pytest.fixture
def run_in_two(train_tiny, cut, tmp_path) -> Callable[..., tuple[Run, Run]]:
    """Run whole, and cut off before a step and resumed."""

    def run(before: int = 4, **settings: Any) -> tuple[Run, Run]:
        settings = {"max_steps": 5, "checkpoint_every": 2, **settings}
        whole = train_tiny("whole", **settings)
        with cut(before):
            train_tiny("parts", **settings)
        assert not (tmp_path / "parts" / "model").exists(), "the cut run came to its end"
        return whole, train_tiny("parts", resume="auto", **settings)

    return run


EVALUATED = {"eval_fraction": 0.25, "eval_steps": 1, "early_stopping_patience": 3, "pairs_per_step": 4}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "evaluated": EVALUATED,
    "stopped early": {**EVALUATED, "before": 3, "early_stopping_patience": 2, "best_metric": "eval_rewards/accuracies"},
    "LoRA": {"lora_rank": 2},
    "8-bit": {"optimizer": "adamw8bit"},
    "running mean": {"loss_type": "bco_pair"},
    "no reference": {"loss_type": "simpo"},
    "full passes": {"batches_per_step": 2, "plan_window": 8},
    "padded": {"packing": False},
    "several epochs, cosine": {"max_steps": None, "epochs": 1.5, "lr_scheduler_type": "cosine"},
    "bf16": {"dtype": "bfloat16"},
}


class TestSameBits:
    @pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
    def test_as_if_it_had_not_been_cut_off(self, run_in_two, settings):
        whole, resumed = run_in_two(**settings)
        assert_same_run(resumed.output, whole.output)

    def test_another_reference_model(self, run_in_two, tiny_llama, tmp_path):
        other = shutil.copytree(tiny_llama, tmp_path / "other")
        whole, resumed = run_in_two(ref_model=other)
        assert_same_run(resumed.output, whole.output)

    def test_cut_off_twice(self, train_tiny, cut):
        settings = {"max_steps": 6, "checkpoint_every": 2}
        whole = train_tiny("whole", **settings)
        with cut(4):
            train_tiny("parts", **settings)
        with cut(6):
            train_tiny("parts", resume="auto", **settings)
        assert_same_run(train_tiny("parts", resume="auto", **settings).output, whole.output)

    def test_before_the_first_checkpoint(self, run_in_two, capfd):
        """It begins anew, although the folder holds a run."""
        whole, resumed = run_in_two(before=2)
        assert_same_run(resumed.output, whole.output)
        assert "no checkpoint in" in capfd.readouterr().err

    def test_asked_to_stop(self, train_tiny, tmp_path, monkeypatch):
        """A run that was asked to stop has its last whole step in a checkpoint, whatever else it writes."""
        settings = {"max_steps": 5}
        whole = train_tiny("whole", **settings)
        step = Trainer._step

        def ask(self: Trainer, number: int, *more: Any) -> Any:
            interrupts.wanted = interrupts.wanted or number == 3
            return step(self, number, *more)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", ask)
            with pytest.raises(KeyboardInterrupt, match="interrupted after step 3; --resume auto goes on after step 3"):
                train_tiny("parts", **settings)
        assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-00000003"]
        assert_same_run(train_tiny("parts", resume="auto", **settings).output, whole.output)

    def test_by_the_clock(self, train_tiny, monkeypatch):
        run = train_tiny(checkpoint_minutes=1e-9, max_steps=3)
        assert [path.name for path in sorted((run.output / "checkpoints").iterdir())] == [
            "step-00000001",
            "step-00000002",
        ]

    def test_curves_have_no_gap_and_no_repetition(self, run_in_two):
        whole, resumed = run_in_two(report_to="tensorboard", **EVALUATED)
        assert list(curve_points(resumed.output)) == list(curve_points(whole.output))
        assert len(set(curve_points(whole.output))) == len(list(curve_points(whole.output))) > 50

    def test_control_state_that_is_not_put_back_is_seen(self, run_in_two, monkeypatch):
        """The optimizer's means alone make another run."""
        from fused_dpo_engine.training import state

        load = state.load_tensors
        monkeypatch.setattr(
            state,
            "load_tensors",
            lambda folder, tensors, ranks: load(
                folder, {name: value for name, value in tensors.items() if "exp_avg_sq" not in name}, ranks
            ),
        )
        whole, resumed = run_in_two()
        with pytest.raises(AssertionError):
            assert_same_run(resumed.output, whole.output)

    def test_random_numbers_go_on(self, train_tiny, cut, monkeypatch):
        """Nothing here draws any in a step, but somebody's model may."""
        import random

        import numpy as np

        drawn: dict[str, list[Any]] = {}
        step = Trainer._step

        def draw(self: Trainer, *more: Any) -> Any:
            numbers = (float(torch.rand(())), random.random(), float(np.random.rand()))
            drawn.setdefault(self.output.name, []).append(numbers)
            return step(self, *more)

        monkeypatch.setattr(Trainer, "_step", draw)
        settings = {"max_steps": 4, "checkpoint_every": 2}
        random.seed(1)
        np.random.seed(1)
        train_tiny("whole", **settings)
        random.seed(1)
        np.random.seed(1)
        with cut(4):
            train_tiny("parts", **settings)
        torch.manual_seed(9)
        random.seed(9)
        np.random.seed(9)
        train_tiny("parts", resume="auto", **settings)
        assert drawn["parts"] == [*drawn["whole"][:3], *drawn["whole"][2:]]


class TestWhereItGoesOn:
    def test_from_a_path_into_another_folder(self, train_tiny, tmp_path, toy_settings):
        """The new folder holds the whole run, and the old one is as it was."""
        settings = {"max_steps": 5, "checkpoint_every": 2, "checkpoints_kept": 9, **EVALUATED}
        settings["report_to"] = "tensorboard"
        whole = train_tiny("whole", **settings)
        before = {path: path.stat().st_mtime_ns for path in whole.output.rglob("*")}
        resumed = train_tiny("other", resume=whole.output / "checkpoints" / "step-00000002", **settings)
        assert_same_run(resumed.output, whole.output)
        assert list(curve_points(resumed.output)) == list(curve_points(whole.output))
        assert {path: path.stat().st_mtime_ns for path in whole.output.rglob("*")} == before
        again = train_tiny("again", resume=whole.output, **settings)  # the newest of its checkpoints
        assert_same_run(again.output, whole.output)

    def test_from_an_older_one_of_the_same_run(self, train_tiny, tmp_path):
        settings = {"max_steps": 7, "checkpoint_every": 2, "checkpoints_kept": 3}
        whole = train_tiny("whole", **settings)
        weights, metrics = whole.weights(), whole.metrics
        folder = whole.output / "checkpoints"
        again = train_tiny("whole", resume=folder / "step-00000002", **settings)
        assert without_clock(again.metrics) == without_clock(metrics)
        assert_same_weights(again.weights(), weights)
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004", "step-00000006"]

    @pytest.mark.parametrize("every", [0, 2])
    def test_a_run_that_has_come_to_its_end(self, train_tiny, capfd, every):
        first = train_tiny(checkpoint_every=every)
        before = {path: path.read_bytes() for path in first.output.rglob("*") if path.is_file()}
        again = train_tiny(checkpoint_every=every, resume="auto")
        told = capfd.readouterr().err
        assert "nothing is left to do" in told
        assert "anew" not in told
        assert again.summary == Summary(**json.loads((first.output / "summary.json").read_text()))
        assert {path: path.read_bytes() for path in first.output.rglob("*") if path.is_file()} == before
        with pytest.raises(UserError, match=r"come to its end with other settings .--beta: 0\.1, is now 0\.2"):
            train_tiny(resume="auto", beta=0.2)

    def test_auto_begins_where_there_is_nothing(self, train_tiny):
        assert train_tiny("a", resume="auto").metrics[-1]["step"] == 3

    @pytest.mark.parametrize("what", ["missing", "empty", "another folder"])
    def test_no_checkpoint_there(self, train_tiny, tmp_path, what):
        path = tmp_path / "nowhere"
        if what != "missing":
            path.mkdir()
        if what == "another folder":
            (path / "checkpoints" / "step-00000001").mkdir(parents=True)
        with pytest.raises(UserError, match=f"--resume {path}: no checkpoint"):
            train_tiny(resume=path)
        assert not (tmp_path / "run").exists()

    def test_never_is_the_default(self, train_tiny, train):
        train_tiny(checkpoint_every=1)
        outcome = train()
        assert outcome.status == 2
        assert "--resume auto to go on with it" in outcome.err

    def test_overwrite_removes_old_checkpoints(self, train_tiny):
        train_tiny(checkpoint_every=1)
        run = train_tiny(overwrite=True)
        assert not (run.output / "checkpoints").exists()

    def test_settings_of_a_resumed_run_begin_another(self, train_tiny, train, tmp_path):
        first = train_tiny("first", checkpoint_every=2)
        resumed = train_tiny("resumed", resume=first.output, checkpoint_every=2)
        outcome = train(config=resumed.output / "config.json")
        assert outcome.status == 0
        assert "going on" not in outcome.err

    def test_overwrite_and_resume(self, train):
        outcome = train(overwrite=True, resume="auto")
        assert outcome.status == 2
        assert "give one of them" in outcome.err


def test_schedule_is_a_function_of_seed_and_step():
    """What a run that goes on sees is what would have followed."""
    run = RunOptions(output="", max_steps=9, pairs_per_step=5)
    first, second = (list(Schedule(toy_pairs(), run, PackingOptions())) for _ in range(2))
    assert first == second
