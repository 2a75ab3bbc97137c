"""Fingerprints: what changes a model changes them, and nothing else does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model import fingerprint as module
from fused_dpo_engine.model.fingerprint import fingerprint, weight_files
from tests.engine.support.toys import save_folder


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def adapters(tiny_llama: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapters"))
    return tmp_path / "adapters"


def change_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}, indent=7), encoding="utf-8")


def flip_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_copy_elsewhere_is_the_same_model(tiny_llama: Path, folder: Path) -> None:
    assert fingerprint(str(folder)) == fingerprint(str(tiny_llama))
    assert len(fingerprint(str(folder))) == 32


@pytest.mark.parametrize("at", [-1, -2000, 4096])
def test_one_bit_of_a_weight_makes_another(folder: Path, at: int) -> None:
    before = fingerprint(str(folder))
    flip_bit(folder / "model.safetensors", at)
    assert fingerprint(str(folder)) != before


def test_every_chunk_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are longer than what is read at a time."""
    before = fingerprint(str(folder))
    monkeypatch.setattr(module, "CHUNK", 1000)
    assert fingerprint(str(folder)) == before
    size = (folder / "model.safetensors").stat().st_size
    for at in range(500, size, size // 7):
        flip_bit(folder / "model.safetensors", at)
        assert fingerprint(str(folder)) != before
        flip_bit(folder / "model.safetensors", at)
    assert fingerprint(str(folder)) == before


def test_what_saving_again_changes_does_not_count(folder: Path) -> None:
    before = fingerprint(str(folder))
    change_json(folder / "config.json", transformers_version="9.9", dtype="float16", _name_or_path="elsewhere")
    (folder / "tokenizer.json").unlink()  # tokens are keys of their own
    assert fingerprint(str(folder)) == before


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-4}, {"rope_theta": 5e5}, {"architectures": ["Other"]}])
def test_the_configuration_counts(folder: Path, change: dict[str, object]) -> None:
    before = fingerprint(str(folder))
    change_json(folder / "config.json", **change)
    assert fingerprint(str(folder)) != before


def test_sharded_weights(tmp_path: Path) -> None:
    """Every shard counts, the same tensors in other files are another fingerprint, and a missing one is named."""
    save_folder(tmp_path / "one", tokenizer=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="30KB")
    shards = weight_files(str(tmp_path / "many"))
    assert len(shards) > 2
    before = fingerprint(str(tmp_path / "many"))
    assert before != fingerprint(str(tmp_path / "one"))
    for shard in shards.values():
        flip_bit(shard, -1)
        assert fingerprint(str(tmp_path / "many")) != before
        flip_bit(shard, -1)
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks {shard.name}"):
        fingerprint(str(tmp_path / "many"))


def test_weights_of_another_name(folder: Path) -> None:
    """A configuration may name the file, which is then read beside one of the usual name."""
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    change_json(folder / "config.json", transformers_weights="other.safetensors")
    assert list(weight_files(str(folder))) == ["other.safetensors"]
    before = fingerprint(str(folder))
    flip_bit(folder / "model.safetensors", -1)
    assert fingerprint(str(folder)) == before
    flip_bit(folder / "other.safetensors", -1)
    assert fingerprint(str(folder)) != before


def test_adapters(adapters: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Their weights and what scales them count, where their base lies does not, and what is in it does."""
    before = fingerprint(str(adapters))
    assert before != fingerprint(str(tiny_llama))
    config = adapters / "adapter_config.json"
    copy = shutil.copytree(tiny_llama, tmp_path / "base")
    change_json(config, base_model_name_or_path=str(copy), inference_mode=False, target_modules=["v_proj", "q_proj"])
    assert fingerprint(str(adapters)) == before
    flip_bit(copy / "model.safetensors", -1)
    assert fingerprint(str(adapters)) != before
    flip_bit(copy / "model.safetensors", -1)
    for change in ({"lora_alpha": 8}, {"use_rslora": True}, {"r": 4}):
        text = config.read_text(encoding="utf-8")
        change_json(config, **change)
        assert fingerprint(str(adapters)) != before, change
        config.write_text(text, encoding="utf-8")
    assert fingerprint(str(adapters)) == before
    flip_bit(adapters / "adapter_model.safetensors", -1)
    assert fingerprint(str(adapters)) != before


def test_code_counts_where_it_is_run(folder: Path) -> None:
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (folder / "modeling.py").write_text("a = 1\n")
    trusted, plain = fingerprint(str(folder), trust_remote_code=True), fingerprint(str(folder))
    (folder / "modeling.py").write_text("a = 2\n")
    assert fingerprint(str(folder)) == plain
    assert fingerprint(str(folder), trust_remote_code=True) != trusted


def test_messages(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        fingerprint(str(folder))
    (folder / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="must hold a JSON object"):
        fingerprint(str(folder))
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors format"):
        fingerprint(str(folder))
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors format"):
        fingerprint(str(folder))
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="names no files of weights"):
        fingerprint(str(folder))
    with pytest.raises(UserError, match="does not exist"):
        fingerprint(str(tmp_path / "nowhere"))


def test_a_file_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so that the system's refusal is put in."""

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read: .*Permission denied"):
        module._digest(folder / "model.safetensors")
