"""`head_of` in a training step: traced in one graph by `torch.compile`, and nothing looked for twice."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dpo import backbone_of, fused_dpo_logps, head_of
from fused_dpo.models import forward_source
from fused_dpo.models import head as head_module
from tests.kernels.support.families import FAMILIES, build, build_or_skip, tokens

FAMILY = {family.name: family for family in FAMILIES}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama, tied", "gemma2", "granite", "phi", "bart", "inkling2", "gemma3"])
@pytest.mark.parametrize("adapted", [False, True])
def test_traced_in_one_graph(name: str, adapted: bool) -> None:
    model: Any = build_or_skip(FAMILY[name])
    head = model.get_output_embeddings()
    if adapted:
        peft = pytest.importorskip("peft")
        path = next(path for path, module in model.named_modules() if module is head)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=[path], init_lora_weights=False)).eval()
    hidden, labels = torch.randn(1, 8, 32, requires_grad=True), tokens()[None]

    def step(hidden: Tensor) -> Tensor:
        return fused_dpo_logps(hidden, head_of(model), labels)

    inputs = hidden, *(part for part in head_of(model).differentiable if part is not None and part.is_leaf)
    inputs = tuple(part for part in inputs if part.requires_grad)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, got = step(hidden), compiled(hidden)
    assert torch.equal(got, expected)
    for ours, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():  # the weight is an input of the graph, not a constant in it
        head_of(model).weight.mul_(2)
    assert torch.equal(compiled(hidden), step(hidden))


def test_a_whole_step_of_a_model_is_one_graph() -> None:
    model = build(FAMILY["gemma2"])
    ids = tokens()[None]

    def step(ids: Tensor) -> Tensor:
        hidden = backbone_of(model)(ids, use_cache=False).last_hidden_state
        return fused_dpo_logps(hidden, head_of(model), ids)

    expected = step(ids)  # first, as torch before 2.13 asks for
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(ids), expected)


def test_nothing_is_looked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """No source is parsed, no configuration listed and no model walked after the first call."""
    model: Any = build(FAMILY["granite"])
    counts: dict[str, int] = {"parse": 0, "modules": 0, "dir": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **settings)

        return call

    config = type("Config", (type(model.config),), {"__dir__": counted("dir", type(model.config).__dir__)})
    model.config.__class__ = config
    monkeypatch.setattr(forward_source.inspect, "getsource", counted("parse", forward_source.inspect.getsource))
    monkeypatch.setattr(nn.Module, "named_modules", counted("modules", nn.Module.named_modules))
    forward_source._read.cache_clear()
    forward_source.parse.cache_clear()
    head_module._PLACES.clear()
    head = head_of(model)
    assert counts["parse"] > 0
    assert counts["modules"] > 0
    assert counts["dir"] == 0
    first = dict(counts)
    for _ in range(3):
        assert head_of(model) == head
    assert counts == first


def test_another_layer_is_looked_for_again() -> None:
    model: Any = build(FAMILY["llama"])
    head_of(model)
    model.lm_head = nn.Linear(32, 50)
    assert head_of(model).weight is model.lm_head.weight
    model.lm_head = nn.Sequential(nn.Linear(32, 50))
    with pytest.raises(NotImplementedError, match="which has no weight"):
        head_of(model)
