"""Which checkpoints are refused, told by their configuration and weights: other heads, attention of their own."""

import json
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config, T5ForConditionalGeneration

from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.errors import UnsupportedModelError, UserError
from fused_dpo_engine.model.compatibility import causal_class_of, check_architecture
from fused_dpo_engine.model.loading import check_model, load_model
from tests.engine.support.policies import CPU
from tests.engine.support.toys import REFUSED, byte_tokenizer, save_folder, tiny_config

HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


def load(folder: Any, **settings: Any) -> Any:
    return load_model(str(folder), ModelOptions(str(folder)), torch.float32, CPU, **settings)


def another_head(folder: Any, head: str, **settings: Any) -> Any:
    config = tiny_config("llama", **settings)
    getattr(transformers, f"LlamaFor{head}")(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class TestOtherHeads:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("packing", [True, False])
    def test_refused_by_name(self, tmp_path, train, head, tied, packing):
        """With tied embeddings nothing is missing, and the head would be made of the embeddings."""
        folder = another_head(tmp_path / "m", head, tie_word_embeddings=tied)
        outcome = train(model=folder, packing=packing)
        assert outcome.status == 2
        assert f"{folder} holds a LlamaFor{head}, which has another head" in outcome.message

    @pytest.mark.parametrize("head", HEADS)
    def test_refused_by_weights(self, tmp_path, head):
        """Where the configuration does not say what the weights are."""
        folder = another_head(tmp_path / "m", head, tie_word_embeddings=True)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": None}))
        with pytest.raises(UserError, match=r"have another head than a language model's \((score|qa_outputs)\."):
            load(folder)

    def test_as_reference_model(self, tmp_path, train):
        folder = another_head(tmp_path / "m", HEADS[0])
        outcome = train(ref_model=folder)
        assert outcome.status == 2
        assert "LlamaForSequenceClassification" in outcome.message

    @pytest.mark.parametrize(
        "name",
        [
            "LlamaForCausalLM",
            "Gemma3ForConditionalGeneration",
            "GPT2LMHeadModel",
            "LlamaModel",
            "XForCausalLMWithMTP",
            None,
        ],
    )
    def test_language_models_are_not(self, name):
        check_architecture(LlamaConfig(architectures=name and [name]), "m")

    @pytest.mark.parametrize(
        "name", ["BertForMaskedLM", "Qwen2ForRewardModel", "ViTForImageClassification", "WhisperForAudioClassification"]
    )
    def test_others_are(self, name):
        with pytest.raises(UnsupportedModelError, match=f"m holds a {name}"):
            check_architecture(LlamaConfig(architectures=[name]), "m")

    def test_what_its_authors_call_a_causal_model(self):
        config: Any = LlamaConfig(architectures=["MyForChat"])
        config.auto_map = {"AutoModelForCausalLM": "modeling.MyForChat"}
        check_architecture(config, "m")
        assert causal_class_of(config) is None

    @pytest.mark.parametrize("packing", [True, False])
    def test_encoder_decoders(self, tmp_path, packing):
        config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
            load(tmp_path, packing=packing)


class TestAttentionOfTheirOwn:
    @pytest.mark.parametrize("family", REFUSED)
    def test_refused_before_any_weights(self, tmp_path, family, monkeypatch):
        folder = save_folder(tmp_path / family, family)
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
        for check in (load, lambda name: check_model(ModelOptions(str(name)), LoraOptions())):
            with pytest.raises(UnsupportedModelError, match=r"For\w+ .*packed sequences would see each.*--no-packing"):
                check(folder)
        check_model(ModelOptions(str(folder)), LoraOptions(), packing=False)

    def test_a_class_that_finds_no_such_key(self, tiny_llama, monkeypatch):
        """Code that comes with a model may pick from a table too, whatever its class says of itself."""

        def pick(*_, attn_implementation, **__):
            return {"eager": None}[attn_implementation]

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", pick)
        with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM does not take its attention.*--no-packing"):
            load(tiny_llama)

    def test_control_other_keys(self, tiny_llama, monkeypatch):
        def pick(*_, **__):
            raise KeyError("rope_theta")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", pick)
        with pytest.raises(UserError, match="no causal language model could be loaded"):
            load(tiny_llama)


def test_weights_of_another_layout_still_name_what_is_missing(tmp_path):
    folder = save_folder(tmp_path / "m", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors .* such as lm_head\.weight"):
        load(folder)
