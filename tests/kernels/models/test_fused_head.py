"""A head called through its own layer: what `head_of` gives, with the layer's hooks run and all else left as it was."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dpo import FusedHead, LMHead, backbone_of, fused_token_logps, head_of
from tests.kernels.support.families import FAMILIES, build, build_or_skip, tokens

FAMILY = {family.name: family for family in FAMILIES}
LLAMA = FAMILIES[0]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states [1, 8, 32] that need a gradient, and labels."""
    return torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(seed)).requires_grad_(), tokens()[None]


def assert_reads_the_head(head: Callable[..., Any], model: Any) -> None:
    """The call gives the bits and gradients of `head_of(model)`."""
    hidden, labels = rows()
    inputs = [hidden, *(part for part in model.parameters() if part.requires_grad)]
    settings: Any = {"shift": False, "with_stats": ("entropy",)}
    got: Any = head(hidden, labels, **settings)
    expected: Any = fused_token_logps(hidden, head_of(model), labels, **settings)
    for values, truth in zip(got, expected, strict=True):
        assert values is truth is None or torch.equal(values, truth)
    ours, theirs = (torch.autograd.grad(each.logps.sum(), inputs, allow_unused=True) for each in (got, expected))
    assert any(gradient is not None for gradient in theirs[1:])
    for gradient, truth in zip(ours, theirs, strict=True):
        assert (gradient is None) == (truth is None)
        assert gradient is None or torch.equal(gradient, truth)


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gemma2", "cohere", "granite", "phi", "bart", "gpt2"])
def test_families(name: str) -> None:
    model: Any = build_or_skip(FAMILY[name])
    assert_reads_the_head(FusedHead(model), model)


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters(settings: dict[str, Any], tied: bool) -> None:
    peft = pytest.importorskip("peft")
    base = build(FAMILY["llama, tied"] if tied else LLAMA)
    model = peft.get_peft_model(
        base, peft.LoraConfig(**{"target_modules": ["q_proj"], **settings}, init_lora_weights=False)
    ).eval()
    head = FusedHead(model)
    assert_reads_the_head(head, model)
    with model.disable_adapter():
        hidden, labels = rows()
        assert torch.equal(head(hidden, labels).logps, fused_token_logps(hidden, head_of(model), labels).logps)


def test_the_layer_itself_is_as_it_was() -> None:
    model: Any = build(LLAMA)
    layer, names = model.lm_head, list(model.state_dict())
    logits = model(tokens()[None]).logits
    FusedHead(model)
    assert torch.equal(model(tokens()[None]).logits, logits)
    assert model.lm_head is layer
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_modules()].count("lm_head") == 1


def test_hooks_of_the_layer_run_around_it() -> None:
    """As FSDP's do: the weight is there only between them."""
    model: Any = build(LLAMA)
    head, weight = FusedHead(model), model.lm_head.weight
    given = weight.detach().clone()

    def gather(layer: nn.Module, args: Any) -> None:
        weight.data.copy_(given)

    def release(layer: nn.Module, args: Any, output: Any) -> None:
        weight.data.zero_()

    for hook in (gather, release):
        hook.__module__ = "torch.distributed.fsdp"
    model.lm_head.register_forward_pre_hook(gather)
    model.lm_head.register_forward_hook(release)
    weight.data.zero_()
    hidden, labels = rows()
    with torch.no_grad():
        got = head(hidden, labels).logps
        assert torch.equal(got, fused_token_logps(hidden, given, labels).logps)
        assert not torch.equal(got, fused_token_logps(hidden, head_of(model), labels).logps), "control: read outside"


def test_a_function_of_ones_own() -> None:
    model: Any = build(LLAMA)
    hidden, _ = rows()

    def peak(head: LMHead, hidden: Tensor, *, factor: Tensor) -> dict[str, Tensor]:
        return {"peak": factor * (hidden @ head.weight.T).amax(-1)}

    got = FusedHead(model).run(peak, hidden, factor=torch.tensor(2.0))["peak"]
    assert torch.equal(got, 2 * model.lm_head(hidden).amax(-1))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(way: str) -> None:
    """A copy of the model reads its own weight, with a handle of its own or that of the copied handle."""
    model: Any = build(LLAMA)
    head = FusedHead(model)
    if way == "deepcopy":
        other, copied = copy.deepcopy((model, head))
    else:
        file = io.BytesIO()
        torch.save((model, head), file)
        file.seek(0)
        other, copied = torch.load(file, weights_only=False)
    assert other.lm_head is not model.lm_head
    nn.init.normal_(other.lm_head.weight)
    assert torch.equal(other.lm_head(torch.ones(32)), other.lm_head.weight @ torch.ones(32))
    for handle in (copied, FusedHead(other)):
        assert handle.shared == (handle is not copied)
        assert_reads_the_head(handle, other)
    assert_reads_the_head(head, model)
    hidden, labels = rows()
    assert not torch.equal(copied(hidden, labels).logps, head(hidden, labels).logps)


def test_two_handles_and_removal() -> None:
    model: Any = build(LLAMA)
    first, second = FusedHead(model), FusedHead(model)
    assert (first.shared, second.shared) == (False, True)
    assert_reads_the_head(second, model)
    second.remove()
    assert "forward" not in vars(model.lm_head)
    for call in (lambda: first(*rows()), first.remove):
        with pytest.raises(RuntimeError, match=r"the head \(Linear\) has not the forward .* make a new FusedHead"):
            call()
    assert_reads_the_head(FusedHead(model), model)


def test_a_layer_that_takes_the_place() -> None:
    peft = pytest.importorskip("peft")
    model: Any = build(LLAMA)
    head = FusedHead(model)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(RuntimeError, match="another layer took its place"):
        head(*rows())
    assert_reads_the_head(FusedHead(model.eval()), model)


def test_somebody_elses_forward() -> None:
    """Below ours it is refused as before; around ours, taking ours off would lose it."""
    model: Any = build(LLAMA)
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own(hidden) * 2
    with pytest.raises(NotImplementedError, match="was replaced by"):
        FusedHead(model)
    del model.lm_head.forward
    head = FusedHead(model)
    ours = model.lm_head.forward
    model.lm_head.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match="or replaced"):
        head.remove()
    vars(model.lm_head)["forward"] = ours
    vars(ours)["before"] = lambda hidden: own(hidden) * 2
    with pytest.raises(NotImplementedError, match="was replaced by"):
        head_of(model)


@pytest.mark.parametrize("first", ["head", "accelerate"])
@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_offloaded_by_accelerate(first: str, name: str) -> None:
    """Its hook replaces the layer's forward too: the weights are there, whoever came first, and both can be undone."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_submodules

    model: Any = build(FAMILY[name])
    expected = [fused_token_logps(rows()[0], head_of(model), rows()[1]).logps, model(tokens()[None]).logits]
    expected = [each.detach().clone() for each in expected]
    head = FusedHead(model) if first == "head" else None
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    head = head or FusedHead(model)
    assert head_of(model).weight.is_meta, "control: outside of the call the weight is not there"
    with torch.no_grad():
        assert torch.equal(head(*rows()).logps, expected[0])
        assert torch.equal(model(tokens()[None]).logits, expected[1])
    head.remove()
    assert torch.equal(model(tokens()[None]).logits, expected[1])
    head = FusedHead(model)
    remove_hook_from_submodules(model)
    nn.init.ones_(model.lm_head.to_empty(device="cpu").weight)
    assert_reads_the_head(head, model)


def test_wrapped_by_activation_checkpointing() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model: Any = build(LLAMA)
    head = FusedHead(model)
    model.lm_head = checkpoint_wrapper(model.lm_head)
    assert_reads_the_head(head, model)


def test_gradient_checkpointing_and_a_compiled_backbone() -> None:
    """The rest of the model is free to be what it likes."""
    gradients = []
    for way in ("plain", "checkpointed", "compiled"):
        model: Any = build(LLAMA).train()
        head = FusedHead(model)
        if way == "checkpointed":
            model.gradient_checkpointing_enable()
        if way == "compiled":
            backbone_of(model).compile(backend="aot_eager")
        hidden = backbone_of(model)(tokens()[None], use_cache=False).last_hidden_state
        head(hidden, tokens()[None]).logps.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for each in gradients[1:]:
        for gradient, truth in zip(each, gradients[0], strict=True):
            torch.testing.assert_close(gradient, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_whole_step_is_one_graph(name: str) -> None:
    model: Any = build(FAMILY[name])
    head, ids = FusedHead(model), tokens()[None]

    def step(ids: Tensor) -> Tensor:
        return head(backbone_of(model)(ids, use_cache=False).last_hidden_state, ids).logps

    expected = step(ids)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(ids), expected)


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="no output embeddings"):
        FusedHead(nn.Linear(2, 3))
