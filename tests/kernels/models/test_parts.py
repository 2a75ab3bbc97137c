"""`backbone_of` and what both readers say of wrappers: the part whose hidden states the head takes."""

from typing import Any

import pytest
import torch
from torch import nn

from fused_dpo import backbone_of, check_head, head_of
from tests.kernels.support.families import FAMILIES, build, tokens

FAMILY = {family.name: family for family in FAMILIES}
PATHS = {
    **{"llama": "model", "gpt2": "transformer", "gpt_neox": "gpt_neox", "llama4_text": "model", "bart": "model"},
    **{"llava": "model", "gemma3": "model", "llama4": "language_model.model", "granite_speech": "model"},
}


@pytest.mark.parametrize("name", PATHS)
def test_the_part_that_makes_hidden_states(name: str) -> None:
    model = build(FAMILY[name])
    assert backbone_of(model) is model.get_submodule(PATHS[name])


def test_below_wrappers() -> None:
    """PEFT's `base_model` is the tuner, whose output has no `last_hidden_state`."""
    peft = pytest.importorskip("peft")
    llama = build(FAMILY["llama"])
    body = llama.model
    assert backbone_of(torch.compile(llama, backend="eager")) is body
    adapted: Any = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"]))
    assert backbone_of(adapted) is body
    assert backbone_of(adapted)(tokens()[None], use_cache=False).last_hidden_state.shape == (1, 8, 32)


def test_prompt_learning_is_checked_below_its_virtual_tokens() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert check_head(peft.get_peft_model(build(FAMILY["llama"]), config), tokens()) < 1e-5


class DistributedDataParallel(nn.Module):
    """Holds a model as torch's does; a process group is not needed for that."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("read", [head_of, backbone_of, lambda model: check_head(model, tokens())])
def test_wrappers_for_several_devices(read: Any) -> None:
    with pytest.raises(TypeError, match=r"DistributedDataParallel wraps the model: pass its \.module, .*unreduced"):
        read(DistributedDataParallel(build(FAMILY["llama"])))


def test_no_part_of_t5_makes_them() -> None:
    with pytest.raises(TypeError, match=r"T5ForConditionalGeneration does not say .*decoder_hidden_states\[-1\]"):
        backbone_of(build(FAMILY["t5, tied"]))


def test_a_model_without_a_backbone() -> None:
    with pytest.raises(TypeError, match="Linear does not say which of its parts makes the hidden states"):
        backbone_of(nn.Linear(2, 2))
