"""Adapters on heads whose class or wrapper is another than peft's: read right, or refused by name; never left out."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fused_dpo import check_head, head_of
from tests.kernels.support.families import FAMILIES, build, tokens

peft = pytest.importorskip("peft")
LLAMA = FAMILIES[0]


@pytest.fixture
def one_process() -> Iterator[None]:
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapted(**settings: Any) -> Any:
    """A llama with a random adapter on its head."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build(LLAMA), peft.LoraConfig(r=4, target_modules=["lm_head"], **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def compiled(layer: nn.Module) -> Any:
    return torch.compile(layer, backend="eager")


def checkpointed(layer: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(layer)


def derived(layer: nn.Module) -> nn.Module:
    """As its users write it, in a module that is not peft's."""
    layer.__class__ = type("OurLinear", (type(layer),), {"__module__": "ours"})
    return layer


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "checkpoint": checkpointed,
    "checkpoint of compile": lambda layer: checkpointed(compiled(layer)),
    "subclass": derived,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_lora_below_a_wrapper(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted()
    causal = model.get_base_model()
    causal.lm_head = wrap(causal.lm_head)
    head = head_of(model)
    assert head.lora is not None
    assert check_head(model, tokens()) < 1e-5  # fp32, logits of a few nats
    with model.disable_adapter():
        assert head_of(model).lora is None


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_dora_below_a_wrapper_is_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted(use_dora=True)
    causal = model.get_base_model()
    causal.lm_head = wrap(causal.lm_head)
    with pytest.raises(NotImplementedError, match="not plain LoRA"):
        head_of(model)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_an_adapter_under_fully_shard(variant: dict[str, Any]) -> None:
    """FSDP2 swaps the layer's class for one in another module; unsharded, its tensors are plain."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = adapted(**variant)
    layer = model.get_base_model().lm_head
    expected = layer(torch.ones(1, 32)).detach()
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    assert not type(layer).__module__.startswith("peft.")
    layer.unshard()
    if variant:
        with pytest.raises(NotImplementedError, match="not plain LoRA"):
            head_of(model)
        return
    head = head_of(model)
    assert head.lora is not None
    a, b, scale = head.lora
    got = torch.ones(1, 32) @ head.weight.T + scale * (torch.ones(1, 32) @ a.T) @ b.T
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-6)


def test_a_whole_model_below_compile() -> None:
    model: Any = torch.compile(build(LLAMA), backend="eager")
    assert head_of(model).weight is model._orig_mod.lm_head.weight


def test_control_an_adapter_that_is_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_dpo import LMHead
    from fused_dpo.models import fused_head

    monkeypatch.setattr(fused_head, "head_of", lambda model: LMHead(head_of(model).weight))
    with pytest.raises(ValueError, match="the head of LlamaForCausalLM is not read as the model applies it"):
        check_head(adapted(), tokens())


def test_a_derived_layer_with_a_forward_of_its_own_is_refused() -> None:
    model = adapted()
    layer = model.get_base_model().lm_head

    class Doubled(type(layer)):
        def forward(self, *arguments, **settings):
            return 2 * super().forward(*arguments, **settings)

    layer.__class__ = Doubled
    with pytest.raises(NotImplementedError, match=r"an adapter of type .*Doubled, which is not peft's LoRA"):
        head_of(model)


def own_adapter() -> nn.Module:
    """Holds what an adapter holds, and does what nobody knows."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(32, 96)
            self.gate = nn.Parameter(torch.ones(96))

        def forward(self, hidden):
            return self.base_layer(hidden) * self.gate

    return Gated()


def test_adapters_of_others_are_refused() -> None:
    model: Any = build(LLAMA)
    model.lm_head = own_adapter()
    with pytest.raises(NotImplementedError, match=r"an adapter of type .*Gated, which is not peft's LoRA"):
        head_of(model)
