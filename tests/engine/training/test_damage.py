"""Checkpoints that are damaged, lost or too many: which one a run goes on from, and which are removed."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from fused_dpo_engine.checkpoint.folder import Checkpoints
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.errors import UserError
from tests.engine.support.runs import assert_same_run
from tests.engine.support.toys import Run, assert_same_weights, flip


class TestDamage:
    @pytest.fixture
    def stopped(self, train_tiny, cut, tmp_path) -> tuple[Run, Path]:
        """A whole run, and the folder of one with checkpoints of steps 2 and 4."""
        settings = {"max_steps": 6, "checkpoint_every": 2}
        whole = train_tiny("whole", **settings)
        with cut(6):
            train_tiny("parts", **settings)
        return whole, tmp_path / "parts"

    def test_the_one_before_is_taken(self, stopped, train_tiny, capfd):
        """Every file of a checkpoint counts: a bit, the end, the file itself."""
        whole, output = stopped
        newest = output / "checkpoints" / "step-00000004"
        assert (output / "checkpoints" / "step-00000002").is_dir()
        copy = shutil.copytree(output, output.with_name("copy"))
        files = sorted(path.name for path in newest.iterdir())
        assert {"run.json", "checksums.json", ".metadata"} < set(files)
        for number, (name, damage) in enumerate((name, damage) for name in files for damage in (flip, cut_end, remove)):
            shutil.rmtree(output)
            shutil.copytree(copy, output)
            damage(newest / name)
            checkpoint, damaged = Checkpoints(output, 2, Ranks()).newest()
            assert checkpoint is not None
            assert checkpoint.step == 2, (number, name, damage)
            assert str(newest) in damaged[0]
        resumed = train_tiny("parts", resume="auto", max_steps=6, checkpoint_every=2)
        assert f"warning: checkpoint {newest} is damaged" in capfd.readouterr().err
        assert_same_run(resumed.output, whole.output)

    def test_all_of_them(self, stopped, train_tiny, capfd):
        whole, output = stopped
        for folder in (output / "checkpoints").iterdir():
            flip(folder / ".metadata")
        resumed = train_tiny("parts", resume="auto", max_steps=6, checkpoint_every=2)
        assert "the run begins anew" in capfd.readouterr().err
        assert_same_run(resumed.output, whole.output)

    def test_the_one_that_was_asked_for(self, stopped, train_tiny):
        _, output = stopped
        folder = output / "checkpoints" / "step-00000004"
        flip(folder / "run.json")
        with pytest.raises(UserError, match=r"is damaged: run\.json is not what was written"):
            train_tiny("parts", resume=folder, max_steps=6, checkpoint_every=2)

    def test_metrics_are_gone(self, stopped, train_tiny, capfd):
        """The run goes on, and says what is missing."""
        whole, output = stopped
        (output / "metrics.jsonl").unlink()
        resumed = train_tiny("parts", resume="auto", max_steps=6, checkpoint_every=2)
        assert "lacks steps before the checkpoint" in capfd.readouterr().err
        assert [line["step"] for line in resumed.metrics] == [5, 6]
        assert_same_weights(resumed.weights(), whole.weights())

    def test_a_line_that_is_torn(self, stopped, train_tiny):
        whole, output = stopped
        with (output / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"step": 6, "lo')
        assert_same_run(train_tiny("parts", resume="auto", max_steps=6, checkpoint_every=2).output, whole.output)


def cut_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def remove(path: Path) -> None:
    path.unlink()


class TestRotation:
    def test_the_newest_are_kept(self, train_tiny):
        run = train_tiny(max_steps=5, checkpoint_every=1, checkpoints_kept=2)
        names = sorted(path.name for path in (run.output / "checkpoints").iterdir())
        assert names == ["step-00000003", "step-00000004"]

    def test_one_that_fails_removes_none(self, train_tiny, monkeypatch, tmp_path):
        """Disk full in the third: training goes on, the second is still there, and nothing torn is left."""
        from fused_dpo_engine.checkpoint import folder

        save, calls = folder.save_tensors, []

        def full(*arguments: Any) -> None:
            save(*arguments)
            calls.append(1)
            if len(calls) == 3:
                raise folder.SaveError(arguments[0], OSError(28, "No space left on device"))

        monkeypatch.setattr(folder, "save_tensors", full)
        with pytest.warns(UserWarning, match="no checkpoint after step 3: .*No space left on device"):
            run = train_tiny(max_steps=4, checkpoint_every=1, checkpoints_kept=1)
        assert [path.name for path in (run.output / "checkpoints").iterdir()] == ["step-00000002"]
        assert Checkpoints(run.output, 1, Ranks()).newest()[0] is not None
