"""Models split by transformers' plan: torchrun ... -m tests.engine.support.tensor_parallel_ranks FILE.

What is written of each case is in `Found`.
"""

import copy
import math
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
from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.distributed.gradients import by_mesh, clip_gradients
from fused_dpo_engine.distributed.weights import whole_weights
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model import tensor_parallel
from fused_dpo_engine.model.loading import load_model
from fused_dpo_engine.model.tensor_parallel import check_tensor_parallel, split_model
from tests.engine.support.policies import BATCH
from tests.engine.support.toys import tiny_model, worst_gradient_error

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
IN_FLOAT32 = {"dtype": torch.float32, "scale": 2.0}
"""torch's grouped products of experts take no float64; with the scale of the others rounding would be much."""
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, 263 tokens": {"vocab_size": 263},
    "qwen2": {},
    "qwen3": {},
    "qwen3, tied": {"tie_word_embeddings": True},
    "gemma2, tied": {"tie_word_embeddings": True},
    "cohere, tied": {"tie_word_embeddings": True},
    "olmo2": {},
    "phi3": {},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        **EXPERTS,
        **IN_FLOAT32,
    },
    "qwen3_moe": {**EXPERTS, **IN_FLOAT32},
    "mixtral": {**EXPERTS, **IN_FLOAT32},
}
EXPERTS_REFUSED = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)
"""Whether torch is one that cannot gather experts to save them."""
MICRO_BATCHES = 2


class Found(NamedTuple):
    """Holds the differences from one process that a rank has found of one model."""

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
    logps: float = 0.0
    """Relative error of the log-probs of the row, by the ranks' rows of the head."""
    scored: float = 0.0
    """Largest relative error of a gradient of these."""
    norm: float = 0.0
    """Relative error of the norm of all gradients."""
    stepped: float = 0.0
    """Largest relative error of a parameter after a step with clipped gradients."""
    saved: bool = False
    """Gathered and saved it is the model that was split, bit for bit."""


def hidden_of(model: Any) -> Tensor:
    """Hidden states [1, T, D] of a packed row."""
    with packed_call():
        return backbone_of(model)(**BATCH.model_inputs(segment_attention), use_cache=False).last_hidden_state


def backward(model: Any, times: int = MICRO_BATCHES) -> None:
    """Add the gradients of some micro-batches, through the layer's own call."""
    for seed in range(times):
        logits = model.get_output_embeddings()(hidden_of(model))
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=logits.dtype)
        (logits.log_softmax(-1) * weights).mean().backward()


def whole_gradients(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


def score(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of a packed row, without a logit that is gathered, and the gradients of their sum alone."""
    before = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    call = BATCH.head_call(hidden_of(model))
    logps = FusedHead(model)(call.hidden_states, call.labels, **call.settings).logps
    logps.sum().backward()
    found = whole_gradients(model)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        parameter.grad = gradient
    return logps.detach(), found


def step(model: Any) -> float:
    """Clip the gradients to a thousandth, and take a step of AdamW in which their size counts; returns the norm."""
    parameters = list(model.parameters())
    norm = float(clip_gradients(parameters, math.inf))
    clip_gradients(parameters, norm / 1000)
    groups = [{"params": part} for part in by_mesh(parameters)]
    torch.optim.AdamW(groups, lr=0.1, eps=norm / 1000, fused=True).step()
    return norm


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
    found = Found(hidden=float((hidden - expected).norm() / expected.norm()), rows=rows_of(model))
    with torch.no_grad():
        found = found._replace(same_without_gradients=torch.equal(hidden_of(model), hidden))
    backward(model)
    backward(whole)
    truth = whole_gradients(whole)
    plain = [p.grad for p in model.parameters() if p.grad is not None and not hasattr(p, "to_local")]
    found = found._replace(
        gradients=worst_gradient_error(whole_gradients(model), truth),
        ranks_equal=bool(plain) and all(torch.equal(*gathered(gradient)) for gradient in plain),
    )
    model.zero_grad()
    model.gradient_checkpointing_enable()
    backward(model)
    found = found._replace(checkpointed=worst_gradient_error(whole_gradients(model), truth))
    logps, scored = score(model)
    expected, expected_scored = score(whole)
    found = found._replace(
        logps=float((logps - expected).norm() / expected.norm()),
        scored=worst_gradient_error(scored, expected_scored),
    )
    found = found._replace(**head_found(model, whole.get_output_embeddings().weight))
    found = found._replace(saved=is_saved(model, whole, folder))
    norm, expected_norm = step(model), step(whole)
    state, expected_state = whole_weights(model), whole.state_dict()
    moved = [
        float((value - expected_state[name]).norm() / expected_state[name].norm()) for name, value in state.items()
    ]
    return found._replace(norm=abs(norm / expected_norm - 1), stepped=max(moved, default=0.0))


def rows_of(model: Any) -> list[int]:
    return [len(part) for part in gathered(head_of(model).weight)]


def head_found(model: Any, weight: Tensor) -> dict[str, bool]:
    """Compare the ranks' rows with the whole weight, and see where their gradient goes, without leaving one."""
    head, before = head_of(model), model.get_output_embeddings().weight.grad.clone()
    within = FusedHead(model).run(weight_within, weight[:1])
    is_whole = all(torch.equal(torch.cat(gathered(part)), weight) for part in (head.weight, within))
    model.get_output_embeddings().weight.grad = None
    head.weight.sum().backward()
    gradient = model.get_output_embeddings().weight.grad.full_tensor()
    model.get_output_embeddings().weight.grad = before
    return {
        "head": is_whole and dist.get_process_group_ranks(head.process_group) == [0, 1],
        "head_gradient": torch.equal(gradient, torch.ones_like(gradient)),
    }


def is_saved(model: Any, whole: Any, folder: Path) -> bool:
    """Gather and save a model on rank 0, load it on every rank, and compare it with the whole one."""
    state = whole_weights(model)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    dist.barrier()
    loaded, expected = type(model).from_pretrained(folder, dtype=model.dtype).state_dict(), whole.state_dict()
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


def loaded_from(folder: Path, mesh: DeviceMesh) -> float:
    """Load a saved model split; returns the relative error of its hidden states."""
    options = ModelOptions(model=str(folder), dtype="float32", device="cpu")
    check_tensor_parallel(options, LoraOptions(), mesh.size())
    model: Any = load_model(str(folder), options, torch.float32, torch.device("cpu")).model
    split_model(model, mesh)
    whole = load_model(str(folder), options, torch.float32, torch.device("cpu")).model
    assert hasattr(model.get_output_embeddings().weight, "to_local")
    expected = hidden_of(whole)
    return float((hidden_of(model) - expected).norm() / expected.norm())


def main() -> None:
    """Write, of each rank to FILE.RANK, what was found of every case."""
    dist.init_process_group("gloo")
    file = Path(sys.argv[1])
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "model"))["model"]
    made: dict[str, Any] = {}
    for name, changes in CASES.items():
        made[name] = found_of(name, mesh, file.with_name(f"model {name}"), **changes)._asdict()
    made["loaded"] = loaded_from(file.with_name("model qwen3"), mesh)
    tensor_parallel._summed = lambda gradient, group: gradient
    made["control"] = found_of("qwen3", mesh, file.with_name("control"), theirs=True)._asdict()
    torch.save(made, f"{file}.{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
