"""Model folders that are damaged, or meant to do harm: refused with a message, and nothing in them is run."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.loading import check_model, load_model, load_tokenizer
from fused_dpo_engine.model.source import find_source
from tests.engine.support.fuzz import watched
from tests.engine.support.toys import save_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture(autouse=True)
def _in_time(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with watched(20):
        yield


def load(folder: Path, **settings) -> None:
    """All that a run reads of a model."""
    options = ModelOptions(str(folder), **settings)
    check_model(options, LoraOptions())
    load_tokenizer(str(folder), options)
    load_model(str(folder), options, torch.float32, torch.device("cpu"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Touch:
    """Pickled, it makes a file when it is read."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def test_a_sound_one(folder):
    load(folder)


class TestPickles:
    def test_weights(self, folder, tmp_path):
        (folder / WEIGHTS).unlink()
        torch.save({"a": Touch(tmp_path / "witness")}, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"has pickled weights alone \(pytorch_model\.bin\).*save_pretrained"):
            check_model(ModelOptions(str(folder)), LoraOptions())
        assert not (tmp_path / "witness").exists()

    def test_they_are_not_read_beside_others(self, folder, tmp_path):
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "witness")))
        load(folder)
        assert not (tmp_path / "witness").exists()

    def test_adapters(self, folder, tmp_path):
        (folder / WEIGHTS).unlink()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "witness")))
        with pytest.raises(UserError, match=r"no weights of adapters \(adapter_model\.safetensors\).*bin is pickled"):
            find_source(str(folder))
        assert not (tmp_path / "witness").exists()


class TestCode:
    @pytest.fixture
    def evil(self, folder, tmp_path) -> Path:
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w')\nclass C: pass\nclass T: pass\n")
        return folder

    @pytest.mark.parametrize("known", [True, False])
    def test_of_a_model(self, evil, tmp_path, known):
        """That of a type which transformers has needs none, and is trained with its class."""
        classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
        edit(evil / "config.json", auto_map=classes, **({} if known else {"model_type": "evil"}))
        if known:
            load(evil)
        else:
            with pytest.raises(UserError, match="contains custom code"):
                load(evil)
        assert not (tmp_path / "witness").exists()

    def test_of_a_tokenizer(self, evil, tmp_path):
        edit(evil / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T")
        with pytest.raises(UserError, match="contains custom code"):
            load(evil)
        assert not (tmp_path / "witness").exists()

    def test_is_run_where_asked(self, evil, tmp_path, monkeypatch):
        """The control: the file would be there."""
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.syspath_prepend(str(tmp_path / "modules"))
        edit(
            evil / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
        )
        with pytest.raises(UserError):  # the class is none that could be trained
            load(evil, trust_remote_code=True)
        assert (tmp_path / "witness").exists()


class TestWeights:
    @pytest.mark.parametrize(
        "content",
        [b"", struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 10**9) + b"{" + b" " * 1000, bytes(10_000)],
        ids=["empty", "a header beyond all", "a header beyond the file", "zeros"],
    )
    def test_damaged(self, folder, content):
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(UserError, match="no causal language model could be loaded"):
            load(folder)

    def test_cut(self, folder):
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
        with pytest.raises(UserError, match="incomplete metadata"):
            load(folder)

    @pytest.mark.parametrize("kind", ["a folder", "a link to itself", "a pipe"])
    def test_no_file(self, folder, kind):
        (folder / WEIGHTS).unlink()
        if kind == "a folder":
            (folder / WEIGHTS).mkdir()
        elif kind == "a pipe":
            os.mkfifo(folder / WEIGHTS)
        else:
            (folder / WEIGHTS).symlink_to(folder / WEIGHTS)
        with pytest.raises(UserError, match="no causal language model could be loaded"):
            load(folder)

    @pytest.mark.parametrize(
        "file",
        ["../outside.safetensors", "{outside}", "a/../../outside.safetensors", "C:/x.safetensors", "x.bin", 3, None],
    )
    def test_an_index_of_files_elsewhere(self, folder, tmp_path, file):
        outside = tmp_path / "outside.safetensors"
        names = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(outside)
        file = file.format(outside=outside) if isinstance(file, str) else file
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))
        with pytest.raises(
            UserError, match=r"index\.json must map the names of weights to \.safetensors files in its own"
        ):
            load(folder)

    def test_an_index_of_files_beside_it(self, folder):
        names = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(folder / "part.safetensors")
        (folder / INDEX).write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")})
        )
        load(folder)

    @pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[]", "JSON object"), ("{}", "got None")])
    def test_a_damaged_index(self, folder, text, message):
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(text)
        with pytest.raises(UserError, match=message):
            load(folder)


class TestConfigurations:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "cannot be read"),
            ("null", "must hold a JSON object, got None"),
            ("[1]", r"must hold a JSON object, got \[1\]"),
            ("[" * 100_000, "cannot be read: maximum recursion depth"),
            ("\ufffd\0", "cannot be read"),
        ],
        ids=["cut", "null", "a list", "brackets", "binary"],
    )
    def test_damaged(self, folder, text, message):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load(folder)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("num_hidden_layers", 10**9),
            ("num_attention_heads", 0),
            ("hidden_size", "32"),
            ("hidden_size", None),
            ("hidden_size", -4),
            ("vocab_size", 10**12),
            ("vocab_size", 1.5),
            ("hidden_act", "nonsense"),
            ("model_type", 3),
            ("dtype", "nonsense"),
            ("rope_parameters", "x"),
            ("max_position_embeddings", "x"),
            ("quantization_config", []),
        ],
    )
    def test_hostile_values(self, folder, name, value):
        edit(folder / "config.json", **{name: value})
        with pytest.raises(UserError, match=str(folder)):
            load(folder)


class TestTokenizers:
    @pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
    @pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"model": {"type": "BPE"}, "version": 3}', "\ufffd"])
    def test_damaged(self, folder, file, text):
        if file == "tokenizer_config.json" and "model" in text:
            pytest.skip("any object is one")
        (folder / file).write_text(text)
        with pytest.raises(UserError, match=f"no tokenizer could be loaded from {folder}"):
            load_tokenizer(str(folder), ModelOptions(""))

    def test_a_template_that_is_no_text(self, folder):
        (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
        with pytest.raises(UserError, match="no tokenizer could be loaded"):
            load_tokenizer(str(folder), ModelOptions(""))


def test_a_base_beside_the_adapters_is_found_as_any_model_is(sound, tmp_path):
    """A relative path is what peft writes of one; what lies there is held to the same rules."""
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_model.safetensors").write_bytes(b"")
    base = Path(shutil.copytree(sound, tmp_path / "base"))
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../base"}))
    assert Path(find_source(str(adapters)).base).samefile(base)
    (base / WEIGHTS).rename(base / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights alone"):
        check_model(ModelOptions(str(adapters)), LoraOptions())
