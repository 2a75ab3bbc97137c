"""What the backbone saves, kept on the host: the same bits, the activations alone, and how many bytes that is."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fused_dpo_engine.batching.padding import pad
from fused_dpo_engine.model.offload import ActivationOffload
from fused_dpo_engine.model.policy import Policy
from tests.engine.support.policies import BATCH, ORDER, PAIRS
from tests.engine.support.toys import SIZE, gradients, tiny_model

pytestmark = pytest.mark.cpu_units
D, LAYERS, SLOTS = SIZE["hidden_size"], SIZE["num_hidden_layers"], BATCH.num_slots
CHECKPOINTING: dict[str, Any] = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}


def policies(model: Any, dtype: torch.dtype) -> tuple[Policy, Policy, ActivationOffload]:
    """The policy without and with offload."""
    offload = ActivationOffload(model.parameters(), D)
    return Policy(model, dtype), Policy(model, dtype, offload=offload), offload


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_same_bits(family, dtype, checkpointing, layout):
    model = tiny_model(family, dtype=torch.float32, scale=3.0)
    if checkpointing:
        model.gradient_checkpointing_enable(**CHECKPOINTING)
    plain, offloaded, offload = policies(model, dtype)
    batch = BATCH if layout == "packed" else pad(PAIRS, ORDER)
    if layout == "padded":
        model.set_attn_implementation("eager")
    expected = plain(batch).logps
    got = offloaded(batch).logps
    assert torch.equal(got, expected)
    expected_grads, grads = gradients(model, expected.sum()), gradients(model, got.sum())
    assert all(torch.equal(grads[name], gradient) for name, gradient in expected_grads.items())
    assert offload.moved > 0


def test_with_checkpointing_one_row_of_numbers_a_layer_moves():
    """The input of each layer; beyond the layers what the last norm and its square save."""
    model = tiny_model(dtype=torch.float32)
    model.gradient_checkpointing_enable(**CHECKPOINTING)
    _, policy, offload = policies(model, torch.float32)
    policy(BATCH)
    inputs, of_norm = LAYERS * SLOTS * D * 4, 3 * SLOTS * D * 4
    assert inputs <= offload.moved <= inputs + of_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_weights_stay(monkeypatch, dtype, lora):
    """Neither they nor the copies that autocast makes move. Without the rule every matrix of the layers does, once."""
    model: Any = tiny_model(dtype=torch.float32)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    _, policy, offload = policies(model, dtype)
    policy(BATCH)
    activations, offload.moved = offload.moved, 0
    monkeypatch.setattr(offload, "_weights", set())
    monkeypatch.setattr(offload, "_narrow", 0)
    policy(BATCH)
    everything, offload.moved = offload.moved, 0
    monkeypatch.setattr(offload, "_narrow", D // 4)
    policy(BATCH)
    # A frozen weight is saved for the gradient of its input, which what frozen embeddings give does not have.
    unsaved = "layers.0.self_attn.q_proj" if lora else "none"
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and unsaved not in name and p.ndim == 2]
    wide = [p for p in matrices if p.numel() >= SLOTS * (D // 4)]  # narrower ones do not move anyway
    assert wide
    assert offload.moved - activations == dtype.itemsize * sum(p.numel() for p in wide)
    assert everything > offload.moved


def test_what_is_narrow_stays():
    offload = ActivationOffload([], hidden_size=32)
    seen = []
    for width in (7, 8):
        leaf = torch.ones(10, width, requires_grad=True)
        with offload.hooks(tokens=10):
            loss = leaf.square().sum()
        before = offload.moved
        loss.backward()
        seen.append(before)
    assert seen == [0, 10 * 8 * 4]


def test_a_shape_with_the_number_of_slots_is_no_weight():
    weight = torch.nn.Parameter(torch.ones(8, 32))
    offload = ActivationOffload([weight], hidden_size=32)
    for tokens, moved in ((5, 0), (8, 8 * 32 * 4)):
        with offload.hooks(tokens):
            weight.square()
        assert offload.moved == moved


def test_without_gradients_nothing_moves():
    _, policy, offload = policies(tiny_model(dtype=torch.float32), torch.float32)
    with torch.no_grad():
        policy(BATCH)
    assert offload.moved == 0
