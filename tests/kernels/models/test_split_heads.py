"""Heads split over ranks, seen from one of them: whose rows they are, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fused_dpo import FusedHead, check_head, fused_token_logps, head_of
from tests.kernels.support.families import FAMILIES, build, build_or_skip, tokens

tensor_parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
STYLES = tensor_parallel.ALL_PARALLEL_STYLES
FAMILY = {family.name: family for family in FAMILIES}


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def split(name: str, mesh: DeviceMesh, style: str = "colwise_gather_output") -> Any:
    """A model whose head transformers has split in a style."""
    model: Any = build_or_skip(FAMILY[name])
    layer = model.get_output_embeddings()
    for parameter, _ in list(layer.named_parameters()):
        STYLES[style].shard_param(layer, parameter, mesh)
    STYLES[style].install_forward(layer, mesh)
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_rows_of_a_rank(name: str, mesh: DeviceMesh) -> None:
    """Local tensors with the group that they are split over, scale, softcap and bias as ever, in its call too."""
    model, whole = split(name, mesh), head_of(build(FAMILY[name]))
    parameter = model.get_output_embeddings().weight
    before = head_of(model)
    within = FusedHead(model).run(lambda head, hidden: head, torch.zeros(1, 32))
    for head in (before, head_of(model), within):
        assert type(head.weight) is Tensor
        assert torch.equal(head.weight, whole.weight)
        assert (head.bias is None) == (whole.bias is None)
        assert head.bias is None or type(head.bias) is Tensor
        assert (head.logit_scale, head.softcap) == (whole.logit_scale, whole.softcap)
        assert (head.process_group, head.vocab_size) == (mesh.get_group(), len(whole.weight))
    before.weight.sum().backward()
    assert torch.equal(parameter.grad.to_local(), torch.ones_like(whole.weight))
    assert check_head(model, tokens()) < 1e-4


@pytest.mark.parametrize("style", ["colwise", "rowwise", "rowwise_rep"])
def test_another_style_is_refused(style: str, mesh: DeviceMesh) -> None:
    """Their weights may look alike, the call of the layer does something else."""
    model = split("llama", mesh, style)
    for call in (head_of, FusedHead):
        with pytest.raises(NotImplementedError, match=r"split over ranks by the style \w+.*give lm_head the style"):
            call(model)


@pytest.mark.parametrize(("name", "beside"), [("bart", "a buffer added to its logits"), ("inkling2", "rows without")])
def test_what_is_whole_beside_the_rows_is_refused(name: str, beside: str, mesh: DeviceMesh) -> None:
    model = split(name, mesh)
    if name == "inkling2" and head_of(build(FAMILY[name])).weight.shape == model.get_output_embeddings().weight.shape:
        pytest.skip("this transformers does not cut Inkling's logits")
    with pytest.raises(NotImplementedError, match=rf"split over ranks by rows, and has {beside}"):
        head_of(model)


def test_an_adapter_beside_the_rows_is_refused(mesh: DeviceMesh) -> None:
    peft = pytest.importorskip("peft")
    model = build(FAMILY["llama"])
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"])).eval()
    layer = adapted.get_base_model().lm_head.base_layer
    STYLES["colwise_gather_output"].shard_param(layer, "weight", mesh)
    STYLES["colwise_gather_output"].install_forward(layer, mesh)
    with pytest.raises(NotImplementedError, match="split over ranks by rows, and has an adapter"):
        head_of(adapted)


def test_shards_of_fsdp_are_never_taken_for_a_head(mesh: DeviceMesh) -> None:
    """They look like rows of the vocabulary, and their ranks see other rows: they stay DTensors, which are refused."""
    from torch.distributed.fsdp import fully_shard

    model: Any = build(FAMILY["llama"])
    fully_shard(model.lm_head, mesh=mesh)
    head = head_of(model)
    assert head.process_group is None
    assert type(head.weight) not in (Tensor, nn.Parameter)
    with pytest.raises(NotImplementedError, match="is a DTensor, split over ranks"):
        fused_token_logps(torch.zeros(1, 8, 32), head, tokens()[None])
