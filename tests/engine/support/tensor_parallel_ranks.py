"""Models split by transformers' plan, against one process: torchrun ... -m tests.engine.support.tensor_parallel_ranks FILE.

What each case writes is in `Found`.
"""

import copy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES  # pyright: ignore[reportPrivateImportUsage]

from fused_dpo import FusedHead, LMHead, backbone_of, head_of
from fused_dpo_engine.attention.interface import packed_call
from fused_dpo_engine.attention.segments import segment_attention
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model import tensor_parallel
from fused_dpo_engine.model.tensor_parallel import split_model, whole_state_dict
from tests.engine.support.policies import BATCH
from tests.engine.support.toys import tiny_model, worst_gradient_error

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
IN_FLOAT32 = {"dtype": torch.float32, "scale": 2.0}
"""What torch's grouped products of experts take, and with the scale of the others their rounding would be all there is."""
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, 263 tokens": {"vocab_size": 263},
    "qwen2": {},
    "qwen3": {},
    "qwen3, tied": {"tie_word_embeddings": True},
    "gemma2, tied": {"tie_word_embeddings": True},
    "qwen3_moe": {**EXPERTS, **IN_FLOAT32},
    "mixtral": {**EXPERTS, **IN_FLOAT32},
}
MICRO_BATCHES = 2


class Found(NamedTuple):
    """What a rank found of a model."""

    refused: str = ""
    """Why it was not split."""
    hidden: float = 0.0
    """Relative error of the hidden states of a packed row."""
    same_without_gradients: bool = False
    """They are the same bits without gradients."""
    gradients: float = 0.0
    """Largest relative error of a gradient, of two micro-batches."""
    checkpointed: float = 0.0
    """The same with gradient checkpointing."""
    ranks_equal: bool = False
    """Gradients of what is not split are the same bits on every rank."""
    rows: list[int] | None = None
    """Rows of the head on each rank."""
    head: bool = False
    """Together they are the whole head, read directly and within its call."""
    head_gradient: bool = False
    """A gradient of a rank's rows arrives there in the parameter."""
    saved: bool = False
    """Gathered and saved it is the model that was split, bit for bit."""


def hidden_of(model: Any) -> Tensor:
    """Hidden states [1, T, D] of a packed row."""
    with packed_call():
        return backbone_of(model)(**BATCH.model_inputs(segment_attention), use_cache=False).last_hidden_state


def backward(model: Any, times: int = MICRO_BATCHES) -> None:
    """Add the gradients of some micro-batches, through the layer's own call."""
    for seed in range(times):
        logits = model.lm_head(hidden_of(model))
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=logits.dtype)
        (logits.log_softmax(-1) * weights).mean().backward()


def whole_gradients(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


def gathered(part: Tensor) -> list[Tensor]:
    """A tensor of every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part.detach())
    return parts


def weight_within(head: LMHead, hidden: Tensor) -> Tensor:
    return head.weight


def found_of(family: str, mesh: DeviceMesh, folder: Path, *, theirs: bool = False, **changes: Any) -> Found:
    """Split a tiny model of a family, and compare it with the whole one.

    With `theirs` the norms of single heads are in the care of transformers' own style.
    """
    model = tiny_model(family.split(",")[0], **changes)
    whole = copy.deepcopy(model)
    try:
        split_model(model, mesh)
    except UserError as error:
        return Found(refused=str(error))
    for layer in model.model.layers if theirs else ():
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            ALL_PARALLEL_STYLES["replicated_with_grad_allreduce"].install_forward(norm, mesh)
    hidden, expected = hidden_of(model), hidden_of(whole)
    with torch.no_grad():
        same = torch.equal(hidden_of(model), hidden)
    backward(model)
    backward(whole)
    truth, got = whole_gradients(whole), whole_gradients(model)
    plain = [p.grad for p in model.parameters() if p.grad is not None and not hasattr(p, "to_local")]
    ranks_equal = bool(plain) and all(torch.equal(*gathered(gradient)) for gradient in plain)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    backward(model)
    checkpointed = worst_gradient_error(whole_gradients(model), truth)
    head, within = head_of(model), FusedHead(model).run(weight_within, hidden.detach())
    parts = gathered(head.weight)
    is_whole = all(torch.equal(torch.cat(gathered(part)), whole.lm_head.weight) for part in (head.weight, within))
    is_whole = is_whole and dist.get_process_group_ranks(head.process_group) == [0, 1]
    model.zero_grad()
    head.weight.sum().backward()
    gradient = model.lm_head.weight.grad.full_tensor()
    state = whole_state_dict(model)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    dist.barrier()
    loaded = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
    dist.barrier()
    return Found(
        "",
        float((hidden - expected).norm() / expected.norm()),
        same,
        worst_gradient_error(got, truth),
        checkpointed,
        ranks_equal,
        [len(part) for part in parts],
        is_whole,
        torch.equal(gradient, torch.ones_like(gradient)),
        loaded.keys() == whole.state_dict().keys()
        and all(torch.equal(loaded[name], value) for name, value in whole.state_dict().items()),
    )


def main() -> None:
    """Write, of each rank to FILE.RANK, what was found of every case."""
    dist.init_process_group("gloo")
    mesh, file = init_device_mesh("cpu", (dist.get_world_size(),)), Path(sys.argv[1])
    made: dict[str, Any] = {}
    for name, changes in CASES.items():
        made[name] = found_of(name, mesh, file.with_name(f"model {name}"), **changes)._asdict()
    setattr(tensor_parallel, "_summed", lambda gradient, group: gradient)
    made["control"] = found_of("qwen3", mesh, file.with_name("control"), theirs=True)._asdict()
    torch.save(made, f"{file}.{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
