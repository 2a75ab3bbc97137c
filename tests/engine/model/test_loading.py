"""Models and tokenizers from folders: what is loaded, and what is refused with a message."""

import logging

import pytest
import torch
from torch import nn

from fused_dpo import backbone_of
from fused_dpo_engine.attention.interface import ATTENTION_NAME
from fused_dpo_engine.batching.padding import pad
from fused_dpo_engine.config.options import LoraOptions, ModelOptions, PackingOptions
from fused_dpo_engine.errors import UnsupportedModelError, UserError
from fused_dpo_engine.model.build import build_policy
from fused_dpo_engine.model.compatibility import check_backbone
from fused_dpo_engine.model.loading import choose_device, choose_dtype, dtype_warning, load_model, load_tokenizer
from fused_dpo_engine.model.parity import self_test
from tests.engine.support.policies import PAIRS
from tests.engine.support.toys import VOCAB, save_folder, tiny_model

pytestmark = pytest.mark.cpu_units

CPU = torch.device("cpu")


class TestLoading:
    @pytest.mark.parametrize(("family", "own"), [("llama", None), ("gemma2", "eager")])
    def test_attention(self, tmp_path, family, own, monkeypatch):
        """SDPA leaves out Gemma 2's softcap in some releases of transformers; None leaves them the choice."""
        asked = []

        def record(*_, attn_implementation, **__):
            asked.append(attn_implementation)
            raise ValueError("enough")

        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", record)
        folder = save_folder(tmp_path / family, family, tokenizer=None)
        for packing in (True, False):
            with pytest.raises(UserError, match="enough"):
                load_model(str(folder), ModelOptions(""), torch.float32, CPU, packing=packing)
        assert asked == [ATTENTION_NAME, own]

    def test_missing_weights(self, tmp_path):
        folder = save_folder(tmp_path / "model", tokenizer=None)
        (folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match=rf"no causal language model could be loaded from {folder}"):
            load_model(str(folder), ModelOptions(str(folder)), torch.float32, CPU)

    def test_pickled_weights_are_not_loaded(self, tmp_path):
        folder = save_folder(tmp_path / "model", tokenizer=None)
        (folder / "model.safetensors").unlink()
        torch.save(tiny_model(dtype=torch.float32).state_dict(), folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="has pickled weights alone"):
            load_model(str(folder), ModelOptions(str(folder)), torch.float32, CPU)

    def test_weights_cut_short(self, tmp_path):
        """As a broken download leaves them."""
        folder = save_folder(tmp_path / "model", tokenizer=None)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(UserError, match="no causal language model could be loaded"):
            load_model(str(folder), ModelOptions(str(folder)), torch.float32, CPU)

    def test_weights_of_another_model(self, tmp_path, caplog):
        """Layers missing from the file would be made up at random, and trained without a word."""
        folder = save_folder(tmp_path / "model", tokenizer=None)
        other = save_folder(tmp_path / "other", tokenizer=None, num_hidden_layers=1)
        (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
        with caplog.at_level(logging.ERROR), pytest.raises(UserError, match=r"layers\.1"):
            load_model(str(folder), ModelOptions(str(folder)), torch.float32, CPU)

    def test_tokenizer_of_a_folder(self, tiny_llama, tmp_path):
        assert len(load_tokenizer(str(tiny_llama), ModelOptions(""))) <= VOCAB
        folder = save_folder(tmp_path / "bare", tokenizer=None)
        with pytest.raises(UserError, match=rf"no tokenizer could be loaded from {folder}: .*tokenizer\.json"):
            load_tokenizer(str(folder), ModelOptions(""))

    @pytest.mark.parametrize("name", ["./nowhere", "~/nowhere-at-all", "{tmp_path}/nowhere", "no/such/folder"])
    def test_missing_folders_never_reach_the_hub(self, tmp_path, name):
        name = name.format(tmp_path=tmp_path)
        with pytest.raises(UserError, match=rf"model folder {name} does not exist"):
            load_tokenizer(name, ModelOptions(""))
        with pytest.raises(UserError, match=rf"model folder {name} does not exist"):
            load_model(name, ModelOptions(""), torch.float32, CPU)

    def test_a_name_that_may_be_of_the_hub(self, monkeypatch):
        """`models/lama` looks like one, and is more often a mistyped folder."""

        def absent(*_, **__):
            raise OSError("models/lama is no valid model identifier")

        monkeypatch.setattr("fused_dpo_engine.model.loading.AutoTokenizer.from_pretrained", absent)
        monkeypatch.setattr("fused_dpo_engine.model.source.AutoConfig.from_pretrained", absent)
        monkeypatch.setattr("fused_dpo_engine.model.source.cached_file", absent)
        with pytest.raises(UserError, match="there is no such folder models/lama"):
            load_tokenizer("models/lama", ModelOptions(""))
        with pytest.raises(UserError, match="there is no such folder models/lama"):
            load_model("models/lama", ModelOptions(""), torch.float32, CPU)
        with pytest.raises(UserError, match=r"give --model \(or --ref-model\) a folder"):
            load_tokenizer("", ModelOptions(""))

    def test_a_model_that_names_its_backbone_wrongly(self, tmp_path):
        """Llama 4's `base_model` is the whole model, whose output has no hidden states of that name."""
        folder = save_folder(tmp_path / "model", "llama4_text", tokenizer=None)
        policy = build_policy(ModelOptions(str(folder), dtype="float32"), LoraOptions(), CPU, packing=False)
        assert policy.causal_lm.base_model is policy.causal_lm
        assert backbone_of(policy.causal_lm) is policy.causal_lm.model
        policy(pad(PAIRS, [0, 1])).logps.sum().backward()
        self_test(policy, PAIRS, PackingOptions(packing=False))

    def test_a_model_without_a_backbone(self):
        class Whole(nn.Module):
            def get_decoder(self):
                return self

            base_model = property(get_decoder)

        with pytest.raises(UnsupportedModelError, match="Whole does not say which of its parts"):
            check_backbone(Whole())

    def test_device_and_dtype(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert choose_device(ModelOptions("m")) == CPU
        assert choose_device(ModelOptions("m", device="cpu")) == CPU
        with pytest.raises(UserError, match="--device cpu"):
            choose_device(ModelOptions("m", device="cuda"))
        assert choose_dtype(ModelOptions("m", dtype="float32"), CPU) == torch.float32
        assert choose_dtype(ModelOptions("m", dtype="bfloat16"), CPU) == torch.bfloat16
        for units, dtype in ((True, torch.bfloat16), (False, torch.float32)):
            monkeypatch.setattr("fused_dpo_engine.model.loading.has_bf16_units", lambda _, units=units: units)
            assert choose_dtype(ModelOptions("m"), CPU) == dtype

    def test_a_slow_dtype_is_warned_of_where_it_was_asked_for(self, monkeypatch):
        for units, dtype in ((False, "auto"), (False, "float32"), (True, "bfloat16")):
            monkeypatch.setattr("fused_dpo_engine.model.loading.has_bf16_units", lambda _, units=units: units)
            assert dtype_warning(ModelOptions("m", dtype=dtype), CPU) is None  # pyright: ignore[reportArgumentType]
        monkeypatch.setattr("fused_dpo_engine.model.loading.has_bf16_units", lambda _: False)
        assert dtype_warning(ModelOptions("m", dtype="bfloat16"), torch.device("cuda")) is None  # not measured there
        warning = dtype_warning(ModelOptions("m", dtype="bfloat16"), CPU)
        assert warning is not None
        assert "a hundred times as long" in warning
        assert "--dtype float32" in warning

    def test_an_instruction_set_that_does_not_exist(self, monkeypatch):
        def refuse(_):
            raise ValueError("ONEDNN_MAX_CPU_ISA=AVX3 names no instruction set")

        monkeypatch.setattr("fused_dpo_engine.model.loading.has_bf16_units", refuse)
        with pytest.raises(UserError, match="AVX3 names no instruction set"):
            choose_dtype(ModelOptions("m"), CPU)
