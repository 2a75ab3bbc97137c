"""`--liger`: which kernels are asked for, and what is refused. liger-kernel itself needs a GPU and is stood in for."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.build import build_policy
from fused_dpo_engine.model.liger import apply_liger
from tests.engine.support.toys import tiny_model

CUDA = torch.device("cuda")


@pytest.fixture
def calls(monkeypatch) -> list[dict[str, Any]]:
    """Calls of a stand-in for liger-kernel's `_apply_liger_kernel_to_instance`, which knows llama alone."""
    made: list[dict[str, Any]] = []
    module = ModuleType("liger_kernel.transformers.monkey_patch")
    vars(module)["MODEL_TYPE_TO_APPLY_LIGER_FN"] = {"llama": None}
    vars(module)["_apply_liger_kernel_to_instance"] = lambda **settings: made.append(settings)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def test_backbone_kernels_and_never_its_cross_entropy(calls):
    model = tiny_model()
    apply_liger(model, CUDA)
    (call,) = calls
    assert call.pop("model") is model
    assert {name for name, asked in call.items() if asked} == {"rope", "rms_norm", "swiglu", "geglu"}
    assert {name for name, asked in call.items() if not asked} == {"cross_entropy", "fused_linear_cross_entropy"}


@pytest.mark.parametrize("name", ["partial_rotary_factor", "rope_parameters"])
def test_no_rotary_embedding_for_a_part_of_the_head(calls, name):
    """liger-kernel's would turn the whole of it."""
    model = tiny_model()
    setattr(model.config, name, 0.75 if name == "partial_rotary_factor" else {"partial_rotary_factor": 0.5})
    apply_liger(model, CUDA)
    assert not calls[0]["rope"]
    assert calls[0]["rms_norm"]


def test_unknown_model_types(calls):
    with pytest.raises(UserError, match=r"nothing for model type 'gpt2'; leave --liger out, or take one of llama\."):
        apply_liger(tiny_model("gpt2"), CUDA)
    assert calls == []


def test_needs_a_gpu(calls, tiny_llama):
    with pytest.raises(UserError, match="--liger needs a CUDA device, this run is on cpu"):
        build_policy(ModelOptions(str(tiny_llama), liger=True), LoraOptions(), torch.device("cpu"))
    assert calls == []


def test_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(UserError, match=r"pip install -U 'fused-dpo\[liger\]'"):
        apply_liger(tiny_model(), CUDA)
