"""What a training step takes on each rank: weights, gradients, optimizer state, and what its passes hold.

With P weights, of which A are trained, on N ranks, every number in fp32 but where it says otherwise, a rank holds::

    one process, ddp:  4 P  weights (below adapters: 2 P in bfloat16)
                       4 A  gradients
                       8 A  AdamW's means, or 2.03 A in 8 bits
    fsdp2:             the same, over N; and gathered, 2 bytes a weight in bfloat16, three layers at a time: the one
                       that computes, the next, and the buffer that this arrives in; the head in fp32 while it
                       computes, in its forward pass twice, as it is and as it arrives; last norm, and embeddings tied
                       to the head, in fp32 all the time; and to reduce gradients, of one layer 2 bytes a weight in
                       bfloat16, 4 as they are added up, and 4 / N that remain, of embeddings or head the last two
    fsdp2, --offload:  what is gathered alone; all that is over N is in host memory

What a step's passes hold beside that comes out of a rehearsal of the model's own code (`rehearsal.py`): autocast's
bfloat16 copies of fp32 weights, activations, what checkpoints save, and the workspace of the head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from torch import nn

from fused_dpo_engine.analysis.rehearsal import Held, Precision, Scene, build, rehearse
from fused_dpo_engine.config.options import LoraOptions
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.layers import decoder_layers, untied_ends

GIB = 2**30
USABLE = 0.94
"""Share of a device's memory that tensors may take: the rest is CUDA's context, libraries and fragments."""
GATHERED_LAYERS = 3
"""Of FSDP2, at most: see above."""
EIGHT_BITS = 2 + 2 * 4 / 256
"""Bytes of AdamW's means of a weight in 8 bits: two bytes, and an fp32 maximum of each for every block of 256."""
SMALL = 4096
"""Tensors of fewer numbers keep means in fp32: bitsandbytes' own bound."""
Strategy = Literal["ddp", "fsdp2"]
_SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size", "vocab_size")
_FEW, _MANY = 1024, 8192
"""Tokens of the rehearsals from which all others follow."""
_MOMENTS: dict[str, str] = {
    **dict.fromkeys(("forward", "head"), "head"),
    **dict.fromkeys(("last", "first", "end"), "layer in work"),
}
"""Of a step's passes, as `Held` has them, and what computes then."""


@dataclass(frozen=True, eq=False)
class ModelShape:
    """What of a model decides its memory, told from its configuration."""

    name: str
    config: Any = field(repr=False)
    lora: LoraOptions = field(default_factory=LoraOptions)
    parameters: int = 0
    """P: all numbers in weights, tied ones once, adapters included."""
    trained: int = 0
    """A: those that are trained."""
    small: int = 0
    """Those of them in tensors too small for 8 bits."""
    layers: int = 0
    of_layers: int = 0
    """P without embeddings, last norm and head."""
    of_embeddings: int = 0
    """Numbers in embeddings that are not tied; 0 for tied ones."""
    of_head: int = 0
    """Numbers in a head that is not tied."""
    uniform: bool = True
    """Layers are all alike."""

    @property
    def frozen(self) -> int:
        """Numbers that are not trained."""
        return self.parameters - self.trained

    @property
    def of_the_rest(self) -> int:
        """Numbers in the last norm, and in embeddings tied to the head."""
        return self.parameters - self.of_layers - self.of_embeddings - self.of_head


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a rank takes at the peak of a step."""

    parts: Mapping[str, int]
    """On the device, by name."""
    host: Mapping[str, int]
    """In the host's memory, by name."""

    @property
    def peak_bytes(self) -> int:
        """Most on the device."""
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        """On the host."""
        return sum(self.host.values())

    def fits(self, device_bytes: float) -> bool:
        """Tell whether a device of so many bytes holds it, what is not tensors included."""
        return self.peak_bytes <= USABLE * device_bytes


def shape_of(name: str, config: Any, lora: LoraOptions | None = None, tensor_parallel: int = 1) -> ModelShape:
    """Count a model's weights, on the meta device.

    Args:
        name: for messages.
        config: of the model.
        lora: adapters to train; None for all weights.
        tensor_parallel: ranks that share every layer, by heads and inner width, and the head by vocabulary.

    Raises:
        UserError: it does not split into so many, or has no modules of the adapters' names.
    """
    lora = lora or LoraOptions()
    config = _split(name, config, tensor_parallel) if tensor_parallel > 1 else config
    model = build(config, lora)
    base = model.get_base_model() if lora.lora_rank else model
    layers = decoder_layers(base)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    sizes = [_numbers(layer) for layer in layers]
    ends = [_numbers(end) for end in untied_ends(base) or ()]
    return ModelShape(
        name,
        config,
        lora,
        parameters=_numbers(model),
        trained=sum(trained),
        small=sum(size for size in trained if size < SMALL),
        layers=len(layers),
        of_layers=sum(sizes),
        of_embeddings=ends[0] if ends else 0,
        of_head=ends[1] if ends else 0,
        uniform=len(set(sizes)) == 1,
    )


def estimate_memory(
    shape: ModelShape,
    *,
    tokens_per_batch: int = 8192,
    strategy: Strategy = "ddp",
    gpus: int = 1,
    offload: bool = False,
    gradient_checkpointing: bool = False,
    offload_activations: bool = False,
    optimizer: Literal["adamw", "adamw8bit"] = "adamw",
    half: bool = True,
    workspace_mib: int = 128,
    accumulates: bool = True,
    reduces_every_pass: bool = True,
    cuda: bool = True,
    pairs: int = 0,
) -> MemoryEstimate:
    """Estimate what each rank takes at the peak of a training step.

    Args:
        shape: the model; with its weights split by tensor parallelism where they are.
        tokens_per_batch: slots of a forward pass, all of them scored.
        strategy: ddp for whole copies (one process too), fsdp2 for shares.
        gpus: N, ranks that share the weights under fsdp2.
        offload: shares live in host memory, which takes fsdp2 whatever `strategy` says.
        gradient_checkpointing, offload_activations, optimizer, workspace_mib: as the options of `fused-dpo train`.
        half: compute in bfloat16, or else in float32.
        accumulates: a step has several forward passes.
        reduces_every_pass: fsdp2 reduces gradients in each of them; False if they add up whole until the last.
        cuda: as on a GPU, or else as on a CPU, where attention computes in fp32.
        pairs: whose reference log-probs are kept on the host.
    """
    sharded = offload or strategy == "fsdp2"
    lora, share = shape.lora.lora_rank > 0, gpus if sharded else 1
    frozen_bytes = 2 if half else 4
    weights = (frozen_bytes * shape.frozen + 4 * shape.trained) / share
    gradients = 4 * shape.trained / share
    means = 8 * shape.trained
    if optimizer == "adamw8bit":
        means = EIGHT_BITS * (shape.trained - shape.small) + 8 * shape.small
    resident = {"weights": weights, "gradients": gradients, "optimizer": means / share}
    host = {"reference": 8.0 * pairs}

    scene = Scene(
        Precision(half, half_layers=half and (lora or sharded), half_rest=half and lora),
        shape.lora,
        gradient_checkpointing,
        offload_activations,
        workspace_mib,
        cuda,
        accumulates or sharded,
    )
    held = held_in_step(shape, scene, tokens_per_batch)
    after = dict(resident)  # in the optimizer's step no activation is left
    if not scene.accumulates:
        del resident["gradients"]  # they come in the course of the backward pass, and are in what is held
    whole = sharded and accumulates and not reduces_every_pass
    passing = _passing(shape, scene, gpus, whole) if sharded else {}
    if offload:
        host |= resident
        resident, after = {}, {}
    if whole:  # in the place of shares, which come as these go
        resident["gradients"] = 4 * shape.trained
    peak = resident | _at_peak(shape, scene, held, tokens_per_batch, passing)
    host["activations"] = held.host
    highest = max(peak, after, key=lambda parts: sum(parts.values()))
    return MemoryEstimate(_whole(highest), _whole(host))


def held_in_step(shape: ModelShape, scene: Scene, tokens: int) -> Held:
    """Tell what a step's passes hold on a row of so many tokens, from rehearsals of rows of other lengths."""
    few, many = (_held(shape, scene, length) for length in (_FEW, _MANY))
    return many.along(few, (tokens - _FEW) / (_MANY - _FEW))


@lru_cache(maxsize=256)
def _held(shape: ModelShape, scene: Scene, tokens: int) -> Held:
    if not shape.uniform or shape.layers < 4:
        return rehearse(shape.config, scene, tokens)
    two, three = (rehearse(shape.config, scene, tokens, layers) for layers in (2, 3))
    return three.along(two, shape.layers - 2)


def _at_peak(
    shape: ModelShape, scene: Scene, held: Held, tokens: int, passing: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Find the moment of a step's passes at which most is held, and name it: what remains of `saved` without any tokens
    are copies of weights.

    Args:
        shape, scene, tokens: what `held` was told from.
        held: beside what FSDP2 makes whole.
        passing: that, by moment.
    """
    moments = {name: getattr(held, name) for name in _MOMENTS}
    moment = max(moments, key=lambda name: moments[name] + sum(passing.get(name, {}).values()))
    few, many = _held(shape, scene, _FEW).saved, _held(shape, scene, _MANY).saved
    copies = held.saved - tokens * (many - few) / (_MANY - _FEW)
    saved = min(held.saved, moments[moment])  # in the end little of it is left
    return {
        **passing.get(moment, {}),
        "copies of weights": min(copies, saved),
        "activations": saved - min(copies, saved),
        _MOMENTS[moment]: moments[moment] - saved,
    }


def _passing(shape: ModelShape, scene: Scene, ranks: int, whole_gradients: bool) -> dict[str, dict[str, float]]:
    """Tell what FSDP2 makes whole for a while, at each moment of a step's passes."""
    half, lora = scene.precision.half, scene.lora.lora_rank > 0
    size = 2 if half else 4
    trained = shape.trained / shape.parameters
    layer = size * shape.of_layers / shape.layers
    layer_to_reduce = trained * shape.of_layers / shape.layers * (size + 4 + 4 / ranks)
    as_it_is = size if lora else 4
    head = as_it_is * shape.of_head
    reduced = 0 if whole_gradients else 4 * trained  # or else it is there already
    summed = reduced * (1 + 1 / ranks)
    of_end = summed if scene.cuda else summed + reduced  # gloo works on a copy

    def moment(gathered: float, to_reduce: float, of_rest: float) -> dict[str, float]:
        gathered, to_reduce = gathered + as_it_is * shape.of_the_rest, to_reduce + of_rest * shape.of_the_rest
        return {"gathered weights": gathered, "gradients to reduce": to_reduce}

    # The head is let go of before its gradient is reduced; embeddings come and go in the forward pass. Gradients of
    # the rest add up whole until the end.
    return {
        "forward": moment(max(GATHERED_LAYERS * layer, 2 * head), 0, 0),
        "head": moment(head + layer, max(0, of_end * shape.of_head - head), 0),
        "last": moment(GATHERED_LAYERS * layer, max(layer_to_reduce, reduced * shape.of_head), reduced),
        "first": moment(GATHERED_LAYERS * layer, layer_to_reduce, reduced),
        "end": moment(0, layer_to_reduce + of_end * shape.of_embeddings, summed),
    }


def _numbers(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def _split(name: str, config: Any, ranks: int) -> Any:
    """Make the configuration of one rank's part of a model."""
    config = type(config).from_dict(config.to_dict())
    text = config.get_text_config()
    heads = text.num_attention_heads
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    for part in _SPLIT:
        size = getattr(text, part, None)
        if size is None:
            continue
        if size % ranks:
            raise UserError(
                f"{name}: {part} {size} does not split into --tensor-parallel {ranks}; give a divisor of it."
            )
        setattr(text, part, size // ranks)
    return config


def _whole(parts: Mapping[str, float]) -> dict[str, int]:
    return {name: round(size) for name, size in parts.items() if round(size)}
