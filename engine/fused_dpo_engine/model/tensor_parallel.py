"""Language models split over ranks by transformers' own plan for tensor parallelism.

Each rank of a group has some heads of every attention layer and some columns of every feed-forward, and all have the
same rows: what goes into a layer and what comes out of it is equal on every rank. So are the gradients of norms and
other parameters that are not split. Embeddings and head are split by rows of the vocabulary; `fused_dpo.head_of` reads
those of the rank.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES  # pyright: ignore[reportPrivateImportUsage]

from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.errors import UserError, first_line
from fused_dpo_engine.model.compatibility import causal_class_of
from fused_dpo_engine.model.source import find_source, read_config

_ROWWISE = ("rowwise", "rowwise_split_input")
_PARTS = dict.fromkeys(("colwise", *_ROWWISE, "colwise_gather_output", "embedding_rowwise"), 1) | {"packed_colwise": 2}
"""Styles that split parameters, and how many matrices lie in one of them, each split on its own."""
_UNEVEN = ("colwise_gather_output", "embedding_rowwise")
"""Those whose number of rows need not divide; releases of transformers that want it to say so."""
_SUMMED = "replicated_with_grad_allreduce"
_KNOWN = {*_PARTS, _SUMMED, "moe_tp_experts"}
"""Compared with one process; the last is of modules whose parameters have styles of their own."""
_GATHERS_EXPERTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
"""Whether DTensor gathers two matrices in one that are split on their own; torch 2.11 does not."""
_WAY_OUT = "do without tensor parallelism; FSDP2 splits any model."


def check_tensor_parallel(options: ModelOptions, lora: LoraOptions, ranks: int) -> None:
    """Find out from a model's configuration alone whether it can be split over so many ranks.

    Raises:
        UserError: it has adapters, quantised weights or code of its own, or see `check_plan`.
    """
    source = find_source(options.model)
    config = read_config(source, options)
    reasons = {
        "adapters are not split": source.adapters is not None or bool(lora.lora_rank),
        "quantised weights are not split": options.load_in_4bit or hasattr(config, "quantization_config"),
        "it comes with code of its own": causal_class_of(config) is None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{options.model} cannot be split over {ranks} ranks: {reason}; {_WAY_OUT}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_plan(model, ranks)


def check_plan(model: Any, ranks: int) -> None:
    """Find out whether a model's plan splits it over so many ranks; it may be on the device `meta`.

    Raises:
        UserError: transformers has no plan for it, or one with a step that was not compared with one process; heads or
            columns do not divide by the ranks.
    """
    reason = next(_reasons_against(model, ranks), None)
    if reason is not None:
        raise UserError(f"{type(model).__name__} cannot be split over {ranks} ranks: {reason}; {_WAY_OUT}")


def _reasons_against(model: Any, ranks: int) -> Iterator[str]:
    places = list(_places(model))
    styles = {style for *_, style in places}
    if not styles - set(_UNEVEN):
        yield "transformers has no plan for its layers"
    if unknown := styles - _KNOWN:
        yield f"its plan has steps that were not compared with one process ({', '.join(sorted(unknown))})"
    if "packed_colwise" in styles and not _GATHERS_EXPERTS:
        yield f"torch {torch.__version__} cannot gather its experts to save them, torch 2.13 can"
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    for count, what in ((heads, "attention heads"), (key_heads, "key-value heads")):
        if count % ranks:
            yield f"its {count} {what} do not divide by them"
    planned = Counter(_parameter(module, name) for _, module, name, style in places if name and style in _PARTS)
    owned = Counter(part for module in model.modules() for part in module.parameters(recurse=False))
    if any(owned[parameter] != count for parameter, count in planned.items()):
        yield "a parameter that its plan splits is tied to one that it does not"
    for path, module, name, style in places:
        if name is None or style not in _PARTS or style in _UNEVEN:
            continue
        shape = _parameter(module, name).shape
        size = shape[-1] if style in _ROWWISE else shape[max(len(shape) - 2, 0)]
        whole = style in _ROWWISE and name == "bias"
        if size % (ranks * _PARTS[style]) and not whole:
            yield f"{path}.{name} has {size} of what is split, which does not divide by them"


def split_model(model: Any, mesh: DeviceMesh) -> None:
    """Split a whole model, equal on all ranks, by its plan: in place, this rank's part onto the device of the mesh.

    Split parameters become DTensors of that mesh, tied ones stay one parameter, and layers get forwards that move what
    goes in and out. The style of norms of single heads is replaced: transformers sums what has been accumulated so far,
    so that the gradient of an earlier micro-batch is counted once a rank; here each gradient is summed as it comes, of
    those that require one now.

    Raises:
        UserError: see `check_plan`, or a style refuses it.
    """
    check_plan(model, mesh.size())
    summed = partial(_summed, group=mesh.get_group())
    split: dict[nn.Parameter, nn.Parameter] = {}
    for path, module, name, style in list(_places(model)):
        if style == _SUMMED:
            if name is not None and _parameter(module, name).requires_grad:
                _parameter(module, name).register_hook(summed)
        elif name is None:
            ALL_PARALLEL_STYLES[style].install_forward(module, mesh)
        else:
            whole = _parameter(module, name)
            if whole not in split:  # else tied to one that was
                split[whole] = _split_parameter(module, name, style, mesh, path)
            module._parameters[name] = split[whole]
    model.to(mesh.device_type)


def _places(model: Any) -> Iterator[tuple[str, nn.Module, str | None, str]]:
    """Walk over what the plan names: path, module, name of its parameter or None for its forward, and the style."""
    plan = model.tp_plan or {}
    for path, module in model.named_modules():
        of_module = plan.get(_pattern(path))
        for name, _ in module.named_parameters(recurse=False):
            style = plan.get(_pattern(f"{path}.{name}"), of_module)
            if style is not None and style != "moe_tp_experts":
                yield path, module, name, style
        if of_module is not None:
            yield path, module, None, of_module


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    return module._parameters[name]  # pyright: ignore[reportReturnType]


def _split_parameter(module: nn.Module, name: str, style: str, mesh: DeviceMesh, path: str) -> nn.Parameter:
    """Let a style split a parameter of a module."""
    try:
        ALL_PARALLEL_STYLES[style].validate_param(module, name, mesh, parameter_name=f"{path}.{name}")
    except ValueError as error:
        raise UserError(f"The model cannot be split: {first_line(error)} {_WAY_OUT}") from error
    ALL_PARALLEL_STYLES[style].shard_param(module, name, mesh)
    return _without_the_rest(_parameter(module, name))


def _pattern(path: str) -> str:
    """Put `*` for the numbers of layers, as plans do."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _without_the_rest(parameter: Any) -> Any:
    """Let go of the memory of the whole parameter, of which a shard by rows is a view."""
    local = parameter.to_local().detach()
    if local.untyped_storage().nbytes() == local.numel() * local.element_size():
        return parameter
    data = DTensor.from_local(
        local.clone(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _summed(gradient: Tensor, group: ProcessGroup) -> Tensor:
    gradient = gradient.clone()
    dist.all_reduce(gradient, group=group)
    return gradient
