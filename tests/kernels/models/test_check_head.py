"""`check_head`: what it leaves alone, what it bounds, and what it says."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fused_dpo import LMHead, check_head, head_of
from fused_dpo.models import fused_head
from tests.kernels.support.families import FAMILIES, build, tokens

FAMILY = {family.name: family for family in FAMILIES}


def test_leaves_the_model_as_it_was() -> None:
    model: Any = build(FAMILY["llama"])
    model.train()
    model.model.norm.eval()
    model.model.layers[0].self_attn.attention_dropout = 0.9  # on in training alone
    modes = [module.training for module in model.modules()]
    config, random = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    assert check_head(model, tokens()) < 1e-5
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_costs_eight_tokens_twice() -> None:
    model: Any = build(FAMILY["llama"])
    seen = []
    model.model.register_forward_pre_hook(
        lambda _, __, settings: seen.append((settings["input_ids"].shape, settings["use_cache"])), with_kwargs=True
    )
    check_head(model, torch.randint(4, 80, (3, 50)))
    assert seen == [((1, 8), False)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "bart"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """The model's own logits are rounded there, by its weights' dtype or autocast's."""
    model = build(FAMILY[name])
    with torch.autocast("cpu", dtype):
        assert check_head(model, tokens()) > 1e-4  # not as exact as in fp32
    assert check_head(model.to(dtype), tokens()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_control_a_scale_is_caught_in_every_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(FAMILY["cohere"]).to(dtype)
    monkeypatch.setattr(fused_head, "head_of", lambda model: LMHead(head_of(model).weight))
    with pytest.raises(ValueError, match=r"the head of CohereForCausalLM .* by .* nat, .*bound.*LMHead made by hand"):
        check_head(model, tokens())


def test_an_error_of_a_hundredth_of_a_nat_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_head, "head_of", lambda model: LMHead(head_of(model).weight, logit_scale=1.001))
    with pytest.raises(ValueError, match="is not read as the model applies it"):
        check_head(build(FAMILY["llama"]), tokens())


def test_numbers_that_are_none_are_caught() -> None:
    model: Any = build(FAMILY["llama"])
    nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="differ from its own logits' by nan nat"):
        check_head(model, tokens())


def test_no_tokens() -> None:
    with pytest.raises(ValueError, match=r"at least one token, got input_ids \[0\]"):
        check_head(build(FAMILY["llama"]), tokens()[:0])


def test_dropout_on_the_head_is_refused_in_training() -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(target_modules=["lm_head"], lora_dropout=0.1)
    model = peft.get_peft_model(build(FAMILY["llama"]), adapters)
    assert check_head(model.eval(), tokens()) < 1e-5
    with pytest.raises(NotImplementedError, match="has dropout"):
        check_head(model.train(), tokens())
