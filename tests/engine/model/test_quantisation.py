"""Weights of few bits: trained with adapters alone, as bitsandbytes is there or not."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model import quantisation
from fused_dpo_engine.model.build import build_policy
from fused_dpo_engine.model.quantisation import check_loaded, check_quantisation
from tests.engine.support.policies import BATCH, CPU
from tests.engine.support.runs import FIRST_LOSS
from tests.engine.support.toys import byte_tokenizer, read_weights, save_folder

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Blocks of 64 weights."""
LORA = LoraOptions(4)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("models") / "wide", **WIDE)


@pytest.fixture(scope="module", params=[4, 8])
def quantised(request, source, tmp_path_factory):
    """A folder of weights of 4 or 8 bits."""
    pytest.importorskip("bitsandbytes", reason="quantises the weights")
    settings = BitsAndBytesConfig(load_in_4bit=request.param == 4, load_in_8bit=request.param == 8)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("models") / f"bits{request.param}"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class TestQuantisedFolders:
    def test_refused_without_adapters(self, quantised, train, tmp_path):
        outcome = train(model=quantised)
        assert outcome.status == 2
        assert "quantised weights cannot be trained (bitsandbytes, " in outcome.message
        assert "give --lora-rank" in outcome.message
        assert not (tmp_path / "run").exists()

    def test_trained_with_adapters(self, quantised, train_tiny):
        run = train_tiny(model=quantised, lora_rank=4)
        assert run.column("loss")[0] == FIRST_LOSS
        saved = read_weights(run.output / "model")
        assert all("lora_" in name for name in saved)
        assert any(float(saved[name].abs().max()) > 0 for name in saved if "lora_B" in name)

    def test_may_be_the_reference(self, quantised, train_tiny, source):
        run = train_tiny(model=source, ref_model=quantised, max_steps=1)
        assert run.column("loss")[0] != FIRST_LOSS  # rounded weights are another model

    def test_gradient_checkpointing(self, quantised):
        options = ModelOptions(str(quantised), dtype="float32", gradient_checkpointing=True)
        policy = build_policy(options, LORA, CPU)
        policy(BATCH).logps.sum().backward()
        assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)

    def test_not_once_more(self, quantised):
        with pytest.raises(UserError, match=r"are quantised already \(bitsandbytes\); leave --load-in-4bit out"):
            build_policy(ModelOptions(str(quantised), load_in_4bit=True), LORA, CPU)


class TestLoadIn4Bit:
    def test_trains_adapters_on_four_bits(self, source, train_tiny):
        pytest.importorskip("bitsandbytes", reason="quantises the weights")
        run = train_tiny(model=source, load_in_4bit=True, lora_rank=4)
        assert run.column("loss")[0] == FIRST_LOSS
        assert json.loads((run.output / "config.json").read_text())["load_in_4bit"] is True
        # and goes on from what was saved, on the same four bits
        again = train_tiny("again", model=run.output / "model", load_in_4bit=True, lora_rank=4)
        assert again.column("loss")[0] == FIRST_LOSS

    def test_what_is_quantised(self, source):
        pytest.importorskip("bitsandbytes", reason="quantises the weights")
        policy = build_policy(ModelOptions(str(source), dtype="bfloat16", load_in_4bit=True), LORA, CPU)
        base = policy.model.get_base_model()
        assert base.is_quantized
        settings = base.config.quantization_config
        assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
        assert base.lm_head.weight.dtype == torch.bfloat16

    def test_needs_adapters(self, train, source):
        outcome = train(model=source, load_in_4bit=True)
        assert outcome.status == 2
        assert "load-in-4bit: quantised weights cannot be trained; give --lora-rank" in outcome.message

    @pytest.mark.parametrize("missing", [("bitsandbytes",), ("bitsandbytes", "accelerate")])
    def test_names_the_extra(self, monkeypatch, train, source, missing):
        monkeypatch.setattr(quantisation, "find_spec", lambda name: None if name in missing else SimpleNamespace())
        outcome = train(model=source, load_in_4bit=True, lora_rank=4)
        assert outcome.status == 2
        expected = f"--load-in-4bit needs {' and '.join(missing)}: pip install 'fused-dpo[qlora]'"
        assert expected in outcome.message


def config_with(**settings: Any) -> Any:
    config: Any = LlamaConfig()
    config.quantization_config = settings
    return config


class TestByConfiguration:
    @pytest.mark.parametrize("settings", [{"quant_method": "bitsandbytes"}, {"load_in_8bit": True}])
    def test_bitsandbytes_is_missing(self, monkeypatch, settings):
        monkeypatch.setattr(quantisation, "find_spec", lambda _: None)
        options = ModelOptions("m")
        with pytest.raises(UserError, match=r"cannot be trained \(bitsandbytes, m\); give --lora-rank"):
            check_quantisation(config_with(**settings), options, LoraOptions())
        with pytest.raises(UserError, match=r"m, whose weights bitsandbytes quantised, needs .*'fused-dpo\[qlora\]'"):
            check_quantisation(config_with(**settings), options, LORA)

    def test_methods_that_may_dequantise_wait_for_the_weights(self):
        check_quantisation(config_with(quant_method="mxfp4"), ModelOptions("m"), LoraOptions())

    def test_what_was_loaded(self):
        config = config_with(quant_method="awq")
        model = SimpleNamespace(config=config, hf_quantizer=SimpleNamespace(is_trainable=False))
        with pytest.raises(UserError, match=r"quantised weights cannot be trained \(awq, m\)"):
            check_loaded(model, "m", trained=True, adapters=False)
        with pytest.raises(UserError, match="are quantised by awq, which takes no gradients"):
            check_loaded(model, "m", trained=True, adapters=True)
        check_loaded(model, "m", trained=False, adapters=False)
        check_loaded(SimpleNamespace(config=config), "m", trained=True, adapters=False)  # dequantised on the way
