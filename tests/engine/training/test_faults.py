"""What happens to a run when its machine fails it: it says so, and goes on from what it had."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import pytest

from fused_dpo_engine.checkpoint.export import recover_model
from fused_dpo_engine.errors import SaveError
from fused_dpo_engine.training.trainer import Trainer
from tests.engine.support.runs import assert_same_run
from tests.engine.support.toys import assert_same_weights, read_metrics, snapshot

SETTINGS = {"max_steps": 5, "checkpoint_every": 2}


@pytest.fixture
def before_step(monkeypatch) -> Callable[[int, Callable[[Trainer], Any]], None]:
    """Let something happen before a step."""

    def let(number: int, happen: Callable[[Trainer], Any]) -> None:
        step = Trainer._step

        def changed(self: Trainer, at: int, *more: Any) -> Any:
            if at == number:
                happen(self)
            return step(self, at, *more)

        monkeypatch.setattr(Trainer, "_step", changed)

    return let


@contextmanager
def files_of_at_most(size: int | None = None) -> Iterator[None]:
    """Let the system refuse larger files, as a full disk or a quota does; with None, put back what it was.

    What is printed goes to no file meanwhile.
    """
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of files")
class TestNoSpace:
    def test_the_run_ends_with_a_word_and_goes_on_later(self, train_tiny, before_step, tmp_path, monkeypatch):
        """From step 3 on nothing large can be written: the checkpoint of step 4 and model/ are refused."""
        import resource

        whole = train_tiny("whole", **SETTINGS)
        with monkeypatch.context(), files_of_at_most():
            limit = (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            before_step(3, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
            with (
                pytest.warns(UserWarning, match="no checkpoint after step 4: .*File too large"),
                pytest.raises(SaveError, match=r"parts/model could not be written: .*; free some space"),
            ):
                train_tiny("parts", **SETTINGS)
        monkeypatch.undo()
        output = tmp_path / "parts"
        assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000002"]
        assert not list(output.rglob("*.new"))
        assert [line["step"] for line in read_metrics(output)] == [1, 2, 3, 4, 5]
        assert json.loads((output / "summary.json").read_text())["stopped"] == "not saved"
        assert_same_run(train_tiny("parts", resume="auto", **SETTINGS).output, whole.output)

    def test_not_even_metrics(self, train_tiny, before_step, tmp_path, monkeypatch):
        """The error names the file; the run goes on later without a torn line."""
        import resource

        whole = train_tiny("whole", **SETTINGS)
        metrics = tmp_path / "parts" / "metrics.jsonl"

        def fill(_: Trainer) -> None:
            limit = metrics.stat().st_size + 100  # a line is torn
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        with files_of_at_most():
            before_step(4, fill)
            with pytest.raises(SaveError, match=r"metrics\.jsonl could not be written: File too large"):
                train_tiny("parts", **SETTINGS)
        monkeypatch.undo()
        assert not metrics.read_text().endswith("\n")
        assert_same_run(train_tiny("parts", resume="auto", **SETTINGS).output, whole.output)


class TestFolder:
    def test_removed_under_the_run(self, train_tiny, before_step, monkeypatch):
        """It is made again, with the model and the checkpoints of later steps."""
        whole = train_tiny("whole", **SETTINGS)
        before_step(4, lambda trainer: shutil.rmtree(trainer.output))
        with pytest.warns(UserWarning, match=r"metrics\.jsonl was removed under the run, which goes on"):
            run = train_tiny("parts", **SETTINGS)
        assert [line["step"] for line in run.metrics] == [4, 5]
        assert_same_weights(run.weights(), whole.weights())
        assert [path.name for path in (run.output / "checkpoints").iterdir()] == ["step-00000004"]

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
    def test_made_read_only_under_the_run(self, train_tiny, before_step, tmp_path, monkeypatch):
        folders = (tmp_path / "run", tmp_path / "run" / "checkpoints")

        def close(_: Trainer) -> None:
            for folder in folders:
                folder.chmod(0o500)

        before_step(4, close)
        try:
            with (
                pytest.warns(UserWarning, match="Permission denied"),
                pytest.raises(SaveError, match="Permission denied"),
            ):
                train_tiny(**SETTINGS)
        finally:
            for folder in folders:
                folder.chmod(0o700)
        monkeypatch.undo()
        assert train_tiny(resume="auto", **SETTINGS).metrics[-1]["step"] == 5

    def test_killed_between_two_renames(self, tmp_path):
        """The model that was there is there again, and nothing else."""
        folder = tmp_path / "model"
        for name in (".model.old", ".model.new"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "weights").write_text(name)
        recover_model(folder)
        assert snapshot(tmp_path) == {"model/weights": b".model.old"}


class TestRequestsToStop:
    def test_twice(self, train, before_step, tmp_path):
        """The second ends it at once: nothing more is written than what was there."""

        def ask(trainer: Trainer) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        before_step(4, ask)
        outcome = train(**SETTINGS)
        assert outcome.status == 130
        assert outcome.err.rstrip().endswith("fused-dpo: interrupted")
        assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-00000002"}
        assert not (tmp_path / "run" / "model").exists()
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped"] == "interrupted"

    def test_none_are_kept(self, train, before_step):
        before_step(2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        outcome = train(checkpoint_minutes=0)
        assert outcome.status == 130
        assert outcome.err.rstrip().endswith("interrupted after step 2; there is no checkpoint to go on from")


def test_an_error_leaves_a_checkpoint(train_tiny, before_step, tmp_path, monkeypatch):
    """As it does from which a run can go on when its cause is mended: memory, somebody's code."""
    whole = train_tiny("whole", **SETTINGS)

    def fail(_: Trainer) -> None:
        raise RuntimeError("somebody's code")

    before_step(4, fail)
    with pytest.raises(RuntimeError, match="somebody's code"):
        train_tiny("parts", **SETTINGS)
    monkeypatch.undo()
    assert (tmp_path / "parts" / "checkpoints" / "step-00000003").is_dir()
    assert_same_run(train_tiny("parts", resume="auto", **SETTINGS).output, whole.output)
