"""The command's output folder: what stands there is safe, and what cannot be written is found early."""

from typing import Any

import pytest

from tests.engine.support.toys import save_folder, snapshot, toy_rows, write_rows

GOOD = toy_rows(3)


class TestOutput:
    """What stands in the output folder is safe from everything but a run that really begins."""

    @pytest.fixture
    def finished(self, train, tmp_path) -> dict[str, bytes]:
        """A run in `tmp_path / "run"`, file by file."""
        assert train().status == 0
        return snapshot(tmp_path / "run")

    def test_a_run_is_not_written_over(self, train, tmp_path, finished):
        outcome = train(seed=1)
        assert outcome.status == 2
        assert f"{tmp_path / 'run'} already holds a run" in outcome.message
        assert "--overwrite" in outcome.message
        assert snapshot(tmp_path / "run") == finished

    @pytest.mark.parametrize("what", ["data", "model", "weights", "option", "vocabulary", "interruption"])
    def test_overwrite_waits_until_all_is_well(self, train, tmp_path, finished, what, monkeypatch):
        settings: dict[str, Any] = {"overwrite": True, "seed": 1}
        if what == "data":
            settings["data"] = write_rows(tmp_path / "bad.jsonl", [*GOOD, {}])
        elif what == "model":
            settings["model"] = tmp_path / "nowhere"
        elif what == "weights":
            settings["model"] = save_folder(tmp_path / "model")
            (tmp_path / "model" / "model.safetensors").unlink()
        elif what == "option":
            settings["beta"] = -1
        elif what == "vocabulary":
            settings["model"] = save_folder(tmp_path / "model", vocab_size=60)
        else:
            monkeypatch.setattr(
                "fused_dpo_engine.commands.train.self_test", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
            )
        assert train(**settings).status == (130 if what == "interruption" else 2)
        assert snapshot(tmp_path / "run") == finished

    def test_other_files_are_left_alone(self, train, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes.txt").write_text("mine")
        assert train().status == 0
        assert (tmp_path / "run" / "notes.txt").read_text() == "mine"

    @pytest.mark.parametrize("below", [False, True])
    def test_output_is_a_file(self, train, tmp_path, below):
        file = tmp_path / "file"
        file.write_text("mine")
        outcome = train(output=file / "run" if below else file)
        assert outcome.status == 2
        assert str(file) in outcome.message
        assert "Traceback" not in outcome.err
        assert file.read_text() == "mine"

    @pytest.mark.parametrize(
        "output", ["/proc/nowhere/run", "{tmp_path}/" + 300 * "x" + "/run"], ids=["denied", "name"]
    )
    def test_output_that_cannot_be_created(self, train, tmp_path, output, monkeypatch):
        """Found before anything is loaded."""
        loaded = []
        monkeypatch.setattr("fused_dpo_engine.commands.train.load_tokenizer", lambda *_: loaded.append(1))
        outcome = train(output=output.format(tmp_path=tmp_path))
        assert outcome.status == 2
        assert "fused-dpo: --output " in outcome.message
        assert "cannot be written" in outcome.message
        assert "Traceback" not in outcome.err
        assert not loaded
        assert list(tmp_path.iterdir()) == []

    def test_output_that_cannot_be_written(self, train, tmp_path, monkeypatch):
        def denied(*_, **__):
            raise PermissionError(13, "Permission denied")

        (tmp_path / "run").mkdir()
        monkeypatch.setattr("tempfile.TemporaryFile", denied)
        outcome = train()
        assert outcome.status == 2
        assert f"--output {tmp_path / 'run'} cannot be written: Permission denied; give another" in outcome.message
        assert list((tmp_path / "run").iterdir()) == []
