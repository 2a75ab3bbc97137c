"""Read the head of a Hugging Face language model."""

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fused_dpo.head import LMHead, LowRankAdapter
from fused_dpo.models.adapters import read_adapter, unwrapped
from fused_dpo.models.forward_source import follow
from fused_dpo.models.head_layer import (
    forward_below_ours,
    refuse_hooks,
    refuse_own_forward,
    refuse_quantised,
    refuse_replaced_forward,
)
from fused_dpo.models.logits import LogitTransform, logit_transform
from fused_dpo.models.parts import causal_model, head_layer, owners_of
from fused_dpo.models.tensor_parallel import is_of_the_plan, refuse_other_splits, rows_of_this_rank


def head_of(model: nn.Module) -> LMHead:
    """Read the head of a Hugging Face language model, with its scale, bias, softcap and LoRA adapter.

    What happens to the logits is read from the forward of the class that makes them, with the values that the model
    holds: a multimodal class may leave out what its text configuration names. `check_head` compares the result with
    the model's own logits. Cheap enough for every step, and traceable: under `torch.compile` scale, softcap and
    refusals are those of the time of tracing (with torch before 2.13, of the last call before it, which there has to
    be).

    Args:
        model: a `transformers` causal LM or encoder-decoder, bare or wrapped by `peft`, `torch.compile` or FSDP1. Tied
            embeddings are fine: the weight is the shared parameter itself, and its gradient arrives there. The head
            takes the hidden states of `backbone_of(model)`, of encoder-decoders the decoder's last ones: a factor on
            these (T5) is in `logit_scale`, a buffer that is added to the logits (BART, Marian) in `bias`. Where logits
            are cut to the first rows (Inkling), weight and bias are views of these. Where transformers' tensor
            parallelism has split the layer by rows, they are this rank's, and `process_group` its group; FSDP2's shards
            stay DTensors, which nothing takes for whole: see `FusedHead`.

    Raises:
        TypeError: the model has no output embeddings, or is wrapped by DistributedDataParallel.
        NotImplementedError: the head carries something the kernels do not know (a quantised weight, several active
            adapters, adapter dropout in training, another adapter than LoRA, layers between the hidden states and the
            weight, as BERT's); its layer has a forward of its own, or hooks other than those that gather or move
            (FSDP's, accelerate's, DeepSpeed's); it is split over ranks in another way than by rows; or the model's
            forward does something to its logits that is not understood.
    """
    causal = causal_model(model)
    layer = head_layer(causal)
    if layer is None or not hasattr(layer, "forward"):
        raise TypeError(
            f"{type(causal).__name__} has no output embeddings to read a head from; pass the weight [V, D] or an "
            f"LMHead."
        )
    base, lora = read_adapter(layer)
    if _MODULES_ARE_CONSTANTS or not torch.compiler.is_compiling():
        for each in (layer, unwrapped(layer), base):
            _refuse_changes(each)
        reading = _read(causal, layer, base)
        if not _MODULES_ARE_CONSTANTS:
            causal._fused_dpo_reading = reading
    else:
        reading = getattr(causal, "_fused_dpo_reading", None)
        if reading is None:
            raise NotImplementedError("with torch before 2.13, call head_of(model) once before it is compiled.")
    weight, bias = base.weight, getattr(base, "bias", None)
    group = size = None
    if reading.split:
        _refuse_beside_a_split(reading, lora)
        group, size = weight.device_mesh.get_group(), weight.shape[0]
        weight, bias = rows_of_this_rank(weight), rows_of_this_rank(bias)
    if bias is not None and reading.on_hidden != 1.0:
        bias = bias / reading.on_hidden  # the model does not scale it, LMHead does
    for owner, name in reading.biases:
        extra = getattr(follow(causal, owner) if owner else causal, name).view(-1) / reading.scale
        bias = extra if bias is None else bias + extra
    if reading.rows is not None:
        weight, bias = weight[: reading.rows], None if bias is None else bias[: reading.rows]
        lora = None if lora is None else LowRankAdapter(lora.a, lora.b[: reading.rows], lora.scale)
    return LMHead(
        weight,
        bias,
        logit_scale=reading.scale,
        softcap=reading.softcap,
        lora=lora,
        process_group=group,
        vocab_size=size,
    )


_MODULES_ARE_CONSTANTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
"""Whether Dynamo hands modules to functions that it takes the results of for constants."""


class _Reading(NamedTuple):
    """What class and configuration say of a head."""

    scale: float
    on_hidden: float
    softcap: float | None
    rows: int | None
    biases: tuple[tuple[str, str], ...]
    """What is added to the logits beside the layer's own bias: path of its owner and its name."""
    split: bool
    """Each rank has some rows of the weight, by the plan of transformers for tensor parallelism."""


class _Place(NamedTuple):
    """Where in a model its head lies."""

    layer: "weakref.ref[nn.Module]"
    owners: tuple[str, ...]
    """Paths of the parts that have this head, from the model itself ("") to the one that makes the logits."""
    path: str
    """Of the layer in the last of them."""


_PLACES: "weakref.WeakKeyDictionary[nn.Module, _Place]" = weakref.WeakKeyDictionary()


def _read(causal: Any, layer: nn.Module, base: Any) -> _Reading:
    """Read what is no tensor, and refuse what cannot be read."""
    refuse_quantised(base)
    refuse_own_forward(base)
    forward = forward_below_ours(base)
    split = is_of_the_plan(forward)
    if split:
        refuse_other_splits(type(base).__name__, forward, base.weight)
    place = _place_of(causal, layer, base)
    owners = [follow(causal, path) if path else causal for path in place.owners]
    transform = logit_transform(owners[-1], place.path)
    _refuse_parts_before(owners[-1], transform)
    vocabulary = len(base.weight)
    biases = tuple(
        (path, name) for path, owner in zip(place.owners, owners, strict=True) for name in _biases_of(owner, vocabulary)
    )
    rows = None if transform.rows in (None, vocabulary) else transform.rows
    return _Reading(transform.scale, transform.on_hidden, transform.softcap, rows, biases, split)


def _refuse_beside_a_split(reading: _Reading, lora: LowRankAdapter | None) -> None:
    """Refuse what tensor parallelism has left whole beside the rows of a rank."""
    beside = "an adapter" if lora else "a buffer added to its logits" if reading.biases else None
    if reading.rows is not None:
        beside = "rows without logits"
    if beside is not None:
        raise NotImplementedError(
            f"the head is split over ranks by rows, and has {beside}, which is not; do without tensor parallelism."
        )


def _refuse_changes(layer: Any) -> None:
    """Refuse what was put on a layer and may change its logits."""
    refuse_replaced_forward(layer)
    refuse_hooks(layer)


# What `torch.compiler.assume_constant_result` sets, which imports Dynamo to do so: it then calls them as they are.
for _function in (_read, _refuse_changes):
    _function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _place_of(causal: Any, layer: nn.Module, base: Any) -> _Place:
    """Find a head in its model, and refuse those that are more than a weight; once, as it walks all parts."""
    known = _PLACES.get(causal) if isinstance(causal, nn.Module) else None
    if known is not None and known.layer() is layer:
        return known
    owners = list(owners_of(causal))
    for owner in owners:
        _refuse_another_head(layer, base, owner)
    names = {id(part): name for name, part in causal.named_modules()} if isinstance(causal, nn.Module) else {}
    paths = tuple(names.get(id(owner), "") for owner in owners)
    prefix = f"{paths[-1]}." if paths[-1] else ""
    place = _Place(weakref.ref(layer), paths, names.get(id(layer), "").removeprefix(prefix))
    if names:
        _PLACES[causal] = place
    return place


def _refuse_another_head(layer: nn.Module, base: Any, owner: Any) -> None:
    """Refuse heads that are more than a weight, and weights that are not the head."""
    name = type(owner).__name__
    if isinstance(owner, nn.Module):
        body = getattr(owner, "base_model", None)
        for part_name, part in owner.named_children():
            # BERT and RoBERTa have a dense layer and a norm beside the weight; Electra one level up.
            if part not in (body, layer) and head_layer(part) is not layer and _has_layers_beside(part, layer):
                raise _parts_before(name, part_name)
    if getattr(getattr(owner, "config", None), "ngram", None):
        raise NotImplementedError(f"{name} makes its logits from a stream of its own (ngram), not its hidden states.")
    if isinstance(base, nn.Embedding):  # FSMT names its input embeddings, which may be tied to the head or not
        linears = [part for part in owner.modules() if isinstance(part, nn.Linear)]
        if any(part.weight.shape == base.weight.shape and part.weight is not base.weight for part in linears):
            raise NotImplementedError(
                f"{name} names its input embeddings as the head, and has a layer of that shape beside; pass the weight "
                f"[V, D] that makes its logits."
            )


def _refuse_parts_before(owner: Any, transform: LogitTransform) -> None:
    """Refuse a model that calls a part of its own between the hidden states and the head (ModernBERT's decoder)."""
    body = getattr(owner, "base_model", None)
    for name in transform.before:
        part = follow(owner, name)
        if part is not body and isinstance(part, nn.Module) and list(part.parameters()):
            raise _parts_before(type(owner).__name__, name)


def _parts_before(model: str, part: str) -> NotImplementedError:
    return NotImplementedError(
        f"{model} changes the hidden states in {part!r} before the head's weight multiplies them; apply that part "
        f"yourself, and pass its output with the weight [V, D] or an LMHead."
    )


def _has_layers_beside(part: nn.Module, layer: nn.Module) -> bool:
    """Tell whether `layer` lies within `part`, and so do other modules with parameters."""
    modules = set(part.modules())
    others = modules - set(layer.modules()) - {part}
    return layer in modules and any(list(module.parameters(recurse=False)) for module in others)


def _biases_of(owner: Any, vocabulary: int) -> Iterator[str]:
    """Name what a model adds to its logits beside the head's own bias: BART's buffer `final_logits_bias` [1, V].

    Raises:
        NotImplementedError: it holds something else with a number for each token.
    """
    own = {**getattr(owner, "_parameters", {}), **getattr(owner, "_buffers", {})}
    for name, value in own.items():
        if value is None or value.numel() != vocabulary:
            continue
        if "bias" not in name:
            raise NotImplementedError(
                f"{type(owner).__name__}.{name} has a number for each token, and may change the logits in a way that "
                f"is not known here; build the LMHead yourself."
            )
        yield name
