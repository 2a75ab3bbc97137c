"""A training step rehearsed on tensors that have shapes and no data: what autograd, autocast and checkpoints hold.

The model's own code runs, so nothing here knows an architecture. The attention and the head are stand-ins that hold
what the kernels hold.
"""

from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Not public; there is no other way to run a model's code and its autograd without memory for them.
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from fused_dpo import backbone_of
from fused_dpo_engine.analysis.ledger import Ledger
from fused_dpo_engine.attention.call import AttentionCall
from fused_dpo_engine.attention.gather import gather_rows
from fused_dpo_engine.attention.interface import ATTENTION_NAME, packed_call
from fused_dpo_engine.attention.plan import AttentionPlan, Segment, plan_attention
from fused_dpo_engine.attention.segments import segment_attention
from fused_dpo_engine.config.options import LoraOptions
from fused_dpo_engine.model.adapters import add_adapters
from fused_dpo_engine.model.layers import checkpoint_layers, decoder_layers
from fused_dpo_engine.model.offload import ActivationOffload, OnHost

BLOCK_ROWS = 128
"""Rows that filtered gradients share a screen for, at most: see the memory of `fused_dpo.fused_dpo_logps`."""
SEGMENT, SHARED = 512, 128
"""Tokens of a segment of the rehearsed row, and those of its trunk that every second one sees too: the keys and values
that a layer gathers follow from these, and masks of windows."""


class Precision(NamedTuple):
    """Dtypes of a step."""

    half: bool = True
    """Compute in bfloat16, by autocast."""
    half_layers: bool = False
    """The weights of layers are in it: frozen below adapters, or gathered so by FSDP2. Others autocast copies."""
    half_rest: bool = False
    """So are embeddings, head and last norm: frozen below adapters."""


class Scene(NamedTuple):
    """What decides what a step holds beside weights, gradients and optimizer state."""

    precision: Precision
    lora: LoraOptions
    checkpointing: bool
    offload_activations: bool
    workspace_mib: int
    cuda: bool
    """Attention as variable-length kernels compute it, and the filter's scratch memory there; False for this CPU's."""
    accumulates: bool
    """The step has several forward passes: gradients are there from the start."""


class Held(NamedTuple):
    """Bytes at the moments that may be the peak, beyond weights, gradients that were there before, and optimizer.

    Each is a linear function of the number of layers, and of that of tokens where these outweigh a layer's weights.
    """

    forward: float
    """Most in the forward pass, the head's included."""
    saved: float
    """After it: activations and copies of weights."""
    head: float
    """Most in the backward pass of the head."""
    last: float
    """Most in that of the last layer, the first to be gone through, while everything else is still saved."""
    first: float
    """Most in that of the first layer, when the others' gradients are there."""
    end: float
    """Most after it, in the backward pass of the embeddings."""
    host: float
    """Saved on the host."""

    @property
    def peak(self) -> float:
        """Most on the device at any time."""
        return max(self[:-1])

    def along(self, other: "Held", steps: float) -> "Held":
        """Go on from `other` so many times the way to this one."""
        return Held(*(there + steps * (here - there) for here, there in zip(self, other, strict=True)))


def rehearse(config: Any, scene: Scene, tokens: int, layers: int | None = None) -> Held:
    """Run one step of a model with so many layers on one packed row, and tell what it holds.

    Args:
        config: of the model.
        scene: how it computes.
        tokens: slots of the row, all of them scored.
        layers: as many as the model has if None; two at least.
    """
    model = build(config, scene.lora, layers, scene.precision)
    if scene.checkpointing:
        checkpoint_layers(model)
    with FakeTensorMode():
        _replace_tensors(model)
        if scene.accumulates:
            for parameter in model.parameters():
                if parameter.requires_grad:  # as added to what is there, the new gradient goes at once
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
        return _step(model.train(), scene, tokens)


def build(config: Any, lora: LoraOptions, layers: int | None = None, precision: Precision | None = None) -> Any:
    """Build a model without data, of so many layers and with adapters, its weights in the dtypes that `precision` says.

    Raises:
        UserError: it has no layers that could be told, or no modules of the adapters' names.
    """
    precision = precision or Precision()
    config = type(config).from_dict(config.to_dict())
    text = config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if precision.half_rest else torch.float32, attn_implementation=ATTENTION_NAME
        )
        if precision.half_layers and not precision.half_rest:
            decoder_layers(model).to(torch.bfloat16)
        return add_adapters(model, "", lora) if lora.lora_rank else model


def _replace_tensors(model: torch.nn.Module) -> None:
    """Give a model on the meta device tensors of the current mode, which have a device; what was tied stays so."""
    made: dict[int, Tensor] = {}
    for part in model.modules():
        for name, old in [*part.named_parameters(recurse=False, remove_duplicate=False)]:
            if id(old) not in made:
                made[id(old)] = torch.nn.Parameter(_as_fake(old), old.requires_grad)
            setattr(part, name, made[id(old)])
        for name, old in [*part.named_buffers(recurse=False)]:
            setattr(part, name, _as_fake(old))


def _as_fake(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _step(model: Any, scene: Scene, tokens: int) -> Held:
    base = model.get_base_model() if scene.lora.lora_rank else model
    offload = _Away(model.parameters(), base.config.get_text_config().hidden_size)
    edges = pairwise([*range(0, tokens, SEGMENT), tokens])
    plan = plan_attention(
        [Segment(*edge, at - at % 2, SHARED if at % 2 else 0) for at, edge in enumerate(edges)]  # trunk, branch, trunk
    )
    row = torch.zeros(1, tokens, dtype=torch.int64)
    most: dict[str, int] = {}

    def note(moment: str, tensor: Tensor) -> None:
        """Read the ledger when the gradient of a tensor is there; frozen embeddings have none.

        Checkpoints of older transformers go through a layer's hooks again, and this takes note a second time.
        """
        if tensor.requires_grad:
            tensor.register_hook(lambda _: most.update({moment: max(most.get(moment, 0), ledger.most())}))

    layers = decoder_layers(base)
    # Of two layers the second is the last one, and one layer is the last one alone.
    named = {layers[min(1, len(layers) - 1)]: "between", layers[0]: "first"} | {layers[-1]: "last"}
    for layer, moment in named.items():
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=moment: note(name, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    with Ledger([*model.parameters(), *model.buffers(), row], _SUBSTITUTES) as ledger:
        with (
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if scene.precision.half else nullcontext(),
            packed_call(),
        ):
            with offload.hooks(tokens) if scene.offload_activations else nullcontext():
                output = backbone_of(base)(
                    input_ids=row,
                    position_ids=row,
                    attention_mask=None,
                    use_cache=False,
                    fused_dpo_plan=plan,
                    fused_dpo_backend=_kernel if scene.cuda else segment_attention,
                )
            hidden = output.last_hidden_state
            half = scene.precision.half
            rows = hidden[0].index_select(0, row[0])
            weight = base.get_output_embeddings().weight
            rows, weight = (tensor.to(torch.bfloat16) if half else tensor for tensor in (rows, weight))
            logps = _Head.apply(rows, weight, scene)
            del output, rows, weight
        forward, saved = ledger.most(), ledger.alive
        note("head", hidden)
        del hidden
        logps.sum().backward()
        most["end"] = ledger.most()
    return Held(forward, saved, most["head"], most["last"], most.get("first", 0), most["end"], offload.moved)


class _Away(ActivationOffload):
    """Puts what is saved where it takes nothing."""

    def _to_host(self, tensor: Tensor) -> OnHost:
        return OnHost(torch.empty_like(tensor, device="meta"), tensor.device)


class _Kernel(torch.autograd.Function):
    """Holds what a variable-length attention kernel holds: its inputs, its output, and a log-sum-exp a row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # pyright: ignore
        output = torch.empty(*query.shape[:2], value.shape[-1], dtype=value.dtype)
        lse = torch.empty(query.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor, *_: Any) -> Tensor:
    """Give the shape of a product by groups: torch's own stand-in refuses fp32, which its kernels take."""
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])


_SUBSTITUTES = {"aten::_grouped_mm": _grouped_mm}


def _kernel(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, call: AttentionCall) -> Tensor:
    q, k, v = (tensor.to(value.dtype)[0].transpose(0, 1) for tensor in (query, key, value))
    if plan.kv_index is not None:
        k, v = gather_rows(k, plan.kv_index), gather_rows(v, plan.kv_index)
    return _Kernel.apply(q, k, v)[None]  # pyright: ignore


class _Head(torch.autograd.Function):
    """Holds what the fused head holds, by the memory that the docstring of `fused_dpo.fused_dpo_logps` states."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, scene: Scene) -> Tensor:  # pyright: ignore
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        filtered = hidden.dtype == torch.bfloat16
        blocks = -(-rows // BLOCK_ROWS) if filtered else 0
        _bytes(_workspace(scene, rows, vocabulary))
        ctx.scene, ctx.blocks = scene, blocks
        state = _bytes((20 if filtered else 12) * rows)
        ctx.save_for_backward(hidden, weight, state, _bytes(2 * vocabulary * blocks))
        return hidden.new_empty(rows, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, dlogps: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        hidden, weight, *_ = ctx.saved_tensors
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        scratch = [_workspace(ctx.scene, rows, vocabulary), 4 * hidden.numel()]
        scratch.append((5 if ctx.scene.cuda else 1) * vocabulary * ctx.blocks)
        if ctx.scene.cuda and ctx.blocks:
            scratch.append(rows * vocabulary // 64)
        held = [_bytes(size) for size in scratch]
        gradients = [
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip((hidden, weight), ctx.needs_input_grad, strict=False)
        ]
        del held
        return *gradients, None


def _workspace(scene: Scene, rows: int, vocabulary: int) -> int:
    """As much as is allowed, or all logits with their gradient, if that is less."""
    return min(scene.workspace_mib * 2**20, 8 * rows * vocabulary)


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
