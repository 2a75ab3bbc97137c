"""Model folders: complete, or as they were."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fused_dpo_engine.checkpoint.export import MANIFEST, remove_model, save_model
from fused_dpo_engine.errors import SaveError
from tests.engine.support.toys import assert_same_weights, byte_tokenizer, read_weights, snapshot, tiny_model


def small(seed: int) -> Any:
    return tiny_model(attention="eager", dtype=torch.float32, seed=seed)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a first model in it."""
    save_model(small(0), byte_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def test_loads_again(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert_same_weights(dict(model.state_dict()), dict(small(0).state_dict()))
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer("yes ✓").input_ids == byte_tokenizer()("yes ✓").input_ids
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    assert names(saved.parent) == {"model"}


def test_replaces_what_it_has_saved(saved):
    """A shard of an earlier save goes, a file of somebody else stays."""
    manifest = json.loads((saved / MANIFEST).read_text())
    assert set(manifest) == names(saved) - {MANIFEST}
    (saved / "shard-2.safetensors").write_text("saved by an earlier call")
    (saved / MANIFEST).write_text(json.dumps([*manifest, "shard-2.safetensors"]))
    (saved / "card").mkdir()
    (saved / "card" / "notes.txt").write_text("mine")
    save_model(small(1), byte_tokenizer(), saved)
    assert "shard-2.safetensors" not in names(saved)
    assert (saved / "card" / "notes.txt").read_text() == "mine"
    assert "card/notes.txt" not in json.loads((saved / MANIFEST).read_text())
    assert_same_weights(read_weights(saved), dict(small(1).state_dict()))
    assert names(saved.parent) == {"model"}


def test_removes_what_it_has_saved(saved):
    """All of it, and the folder with it unless something else is there; what nobody has listed stays."""
    (saved / "notes.txt").write_text("mine")
    remove_model(saved)
    assert names(saved) == {"notes.txt"}
    remove_model(saved)
    assert names(saved) == {"notes.txt"}
    save_model(small(1), byte_tokenizer(), saved)
    (saved / "notes.txt").unlink()
    remove_model(saved)
    assert not saved.exists()
    remove_model(saved)


@pytest.mark.parametrize("manifest", ["", "{}", "not JSON", '["../other.txt", "config.json"]'])
def test_a_damaged_list_removes_nothing_else(saved, manifest):
    (saved.parent / "other.txt").write_text("mine")
    (saved / MANIFEST).write_text(manifest)
    remove_model(saved)
    assert (saved.parent / "other.txt").read_text() == "mine"
    assert "model.safetensors" in names(saved)


class TestInterrupted:
    """By an exception or Ctrl-C; what a power cut leaves is the same up to the next call."""

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_while_writing(self, saved, monkeypatch, error):
        before = snapshot(saved)
        tokenizer = byte_tokenizer()

        def fail(*_, **__):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(type(tokenizer), "save_pretrained", fail)
            with pytest.raises(SaveError if error is OSError else error):
                save_model(small(1), tokenizer, saved)
        assert snapshot(saved) == before
        save_model(small(2), tokenizer, saved)
        assert_same_weights(read_weights(saved), dict(small(2).state_dict()))
        assert names(saved.parent) == {"model"}

    @pytest.mark.parametrize("call", [1, 2])
    def test_while_swapping(self, saved, monkeypatch, call):
        """ "An interruption leaves the old folder or the new one"."""
        rename, calls = Path.rename, 0

        def interrupted(self, target):
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyboardInterrupt
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", interrupted)
            with pytest.raises(KeyboardInterrupt):
                save_model(small(1), byte_tokenizer(), saved)
        assert saved.is_dir()
        got = read_weights(saved)
        assert any(
            all(torch.equal(got[name], tensor) for name, tensor in small(seed).state_dict().items()) for seed in (0, 1)
        )

    def test_left_overs_of_a_kill_are_cleared(self, saved):
        for name in (".model.new", ".model.old"):
            (saved.parent / name).mkdir()
            (saved.parent / name / "model.safetensors").write_bytes(b"half")
        save_model(small(1), byte_tokenizer(), saved)
        assert_same_weights(read_weights(saved), dict(small(1).state_dict()))
        assert names(saved.parent) == {"model"}
