"""Peaks of steps under FSDP2, measured and estimated: torchrun ... -m tests.engine.support.sharded_memory FILE."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from fused_dpo.hardware import has_bf16_units
from fused_dpo_engine.analysis.memory import estimate_memory, shape_of
from fused_dpo_engine.attention.interface import ATTENTION_NAME
from fused_dpo_engine.batching.packing import pack
from fused_dpo_engine.model.policy import Policy
from tests.engine.support.toys import make_pairs, tiny_config
from tests.kernels.support.allocations import MIB, allocations_of

SIZE = {
    **{"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024, "vocab_size": 2000},
}
PASSES = 2


def sharded_policy(half: bool) -> Any:
    """A policy whose layers are gathered one by one, computed in bfloat16 or not."""
    model: Any = AutoModelForCausalLM.from_config(tiny_config("llama", **SIZE), attn_implementation=ATTENTION_NAME)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model, torch.bfloat16 if half else torch.float32, workspace_mib=1)
    dtype = torch.bfloat16 if half else None
    in_layers, whole = (
        MixedPrecisionPolicy(param, reduce_dtype=torch.float32, cast_forward_inputs=False) for param in (dtype, None)
    )
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=in_layers)
    fully_shard(policy, mp_policy=whole)
    return policy


def measure(half: bool, reduces_every_pass: bool) -> tuple[float, int]:
    """The peak of the second step on this rank, and the estimate."""
    policy = sharded_policy(half)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    batch = pack(make_pairs((3, 150, 150), (3, 150, 150)), [0, 1])

    def step() -> list[int]:
        for at in range(PASSES):
            policy.set_requires_gradient_sync(reduces_every_pass or at == PASSES - 1)
            policy(batch).logps.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return [0]

    step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    tensors = [value.to_local() if isinstance(value, DTensor) else value for value in (*policy.parameters(), *state)]
    peak = sum(tensor.nbytes for tensor in tensors) + allocations_of(step).peak * MIB
    estimate = estimate_memory(
        shape_of("sharded", tiny_config("llama", **SIZE)),
        tokens_per_batch=batch.num_slots,
        strategy="fsdp2",
        gpus=dist.get_world_size(),
        gradient_checkpointing=True,
        half=half,
        workspace_mib=1,
        reduces_every_pass=reduces_every_pass,
        cuda=False,
    )
    return peak, estimate.peak_bytes


def main(path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = {"reduced": (False, True), "whole": (False, False)}
    if has_bf16_units(torch.device("cpu")):
        cases["half"] = (True, True)
    found = {name: measure(*case) for name, case in cases.items()}
    if dist.get_rank() == 0:
        path.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
