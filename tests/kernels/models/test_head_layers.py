"""Layers that do more than multiply by their weight, and hooks on them: refused by name."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_dpo import check_head, head_of
from fused_dpo.models.head_layer import HEAD_FORWARD
from tests.kernels.support.families import FAMILIES, build, tokens

LLAMA = FAMILIES[0]


class NormHead(nn.Linear):
    """Baichuan 2's: rows of unit length."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.normalize(self.weight))


class Scaling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.5


class Plain(nn.Module):
    """A linear layer of one's own."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiply."""
        return F.linear(hidden, self.weight, self.bias)


class Hook:
    """Something that is called; nobody knows what it does."""

    def __call__(self, module: nn.Module, *values: Any) -> None: ...


def llama() -> Any:
    return build(LLAMA)


@pytest.mark.parametrize("cls", [NormHead, Scaling])
def test_a_forward_of_its_own(cls: type[nn.Linear]) -> None:
    model = llama()
    model.lm_head.__class__ = cls
    with pytest.raises(NotImplementedError, match=rf"the head is a .*{cls.__name__}, whose forward is not nn.Linear's"):
        head_of(model)


def test_a_forward_that_reads_like_linears() -> None:
    model = llama()
    model.lm_head = Plain(model.lm_head)
    assert check_head(model, tokens()) < 1e-5


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("hook", [Hook(), lambda *_: None], ids=["object", "function"])
def test_hooks_are_refused(kind: str, hook: Any) -> None:
    model = llama()
    handle = getattr(model.lm_head, kind)(hook)
    with pytest.raises(
        NotImplementedError, match=r"the head \(torch.*Linear\) has a forward hook tests\..*take it off"
    ):
        head_of(model)
    handle.remove()
    head_of(model)


def test_a_weight_made_by_a_hook_is_refused() -> None:
    """torch's older weight_norm computes the weight before each call, so that it is stale between them."""
    model = llama()
    nn.utils.weight_norm(model.lm_head)
    with pytest.raises(NotImplementedError, match=r"forward hook torch\.nn\.utils\.weight_norm"):
        head_of(model)


def test_a_weight_made_of_others_is_read() -> None:
    """A parametrization computes it wherever it is read."""
    model = llama()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    model.lm_head.parametrizations.weight.original0.data.mul_(2)
    assert check_head(model, tokens()) < 1e-5


def test_hooks_that_leave_values_alone_are_let_through() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    accelerate.hooks.add_hook_to_module(model.lm_head, accelerate.hooks.AlignDevicesHook("cpu"))
    assert check_head(model, tokens()) < 1e-5

    class Doubling(accelerate.hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    accelerate.hooks.add_hook_to_module(model.lm_head, Doubling(), append=True)
    with pytest.raises(NotImplementedError, match=r"the forward of the head .* was replaced by accelerate"):
        head_of(model)


def test_a_forward_that_was_replaced() -> None:
    model = llama()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * forward(hidden)
    with pytest.raises(NotImplementedError, match=r"was replaced by tests\..*take it off"):
        head_of(model)
    setattr(model.lm_head.forward, HEAD_FORWARD, True)
    assert head_of(model).weight is model.lm_head.weight


def test_an_offloaded_head_is_named() -> None:
    from fused_dpo import fused_dpo_logps

    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(llama(), execution_device="cpu")
    with pytest.raises(ValueError, match=r"lm_head weight is on meta, .*accelerate's offloading"):
        fused_dpo_logps(torch.randn(1, 8, 32), head_of(model), tokens()[None])


class Model(nn.Module):
    """A model of one's own whose forward is tested."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.divisor = nn.Embedding(96, 8), nn.Linear(8, 96), 4.0

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Divides(Model):
    def forward(self, hidden):
        return self.head(hidden / self.divisor)


class DividesBefore(Model):
    def forward(self, hidden):
        hidden = hidden / self.divisor
        return self.head(hidden)


class DividesAfter(Model):
    def forward(self, hidden):
        logits = self.head(hidden).float()
        logits /= self.divisor
        return logits


class Squashes(Model):
    def forward(self, hidden):
        logits = torch.sigmoid(self.head(hidden))
        return {"logits": logits[..., :5]}


class Looks(Model):
    """Nothing is changed that is returned."""

    def forward(self, hidden):
        logits = self.head(hidden)
        self.seen = (logits * 2).mean()
        return logits


@pytest.mark.parametrize(
    ("cls", "step"),
    [
        (Divides, "self.head(hidden / self.divisor)"),
        (DividesBefore, "hidden / self.divisor"),
        (DividesAfter, "logits / self.divisor"),
        (Squashes, "torch.sigmoid(self.head(hidden))"),
    ],
)
def test_steps_that_nobody_knows_are_refused(cls: type[Model], step: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        head_of(cls())
    assert f"{cls.__name__}.forward computes {step!r} on the way to its logits" in str(caught.value)


def test_control_what_is_not_returned_is_no_matter() -> None:
    assert head_of(Looks()).logit_scale == 1.0
