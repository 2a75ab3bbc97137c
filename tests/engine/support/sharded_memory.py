"""Peaks of steps under FSDP2 on one of two ranks, measured and estimated: -m tests.engine.support.sharded_memory FILE.

The other rank is not there: collectives return at once, and leave what they would fill as it is. With gloo's threads
the peak of a step differed by a quarter from run to run, as the profiler misses some of what they free.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

# Not public; there is no other group whose ranks need not be there.
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from fused_dpo.hardware import has_bf16_units
from fused_dpo_engine.analysis.memory import estimate_memory, shape_of
from fused_dpo_engine.attention.interface import ATTENTION_NAME
from fused_dpo_engine.batching.packing import pack
from fused_dpo_engine.distributed.ranks import DATA, TENSOR, Ranks
from fused_dpo_engine.distributed.strategy import Strategy
from fused_dpo_engine.model import parallel
from fused_dpo_engine.model.policy import Policy
from tests.engine.support.toys import make_pairs, tiny_config
from tests.kernels.support.allocations import MIB, allocations_of

SIZE = {
    **{"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024},
}
PASSES = 2
LARGE = 12_000
CASES: dict[str, dict[str, Any]] = {
    "reduced": {},
    "whole": {"reduces_every_pass": False},
    "half": {"half": True},
    "tied": {"tied": True},
    "large head": {"vocabulary": LARGE},
    "large head, in the root": {"vocabulary": LARGE, "in_root": True},
}


class Peak(NamedTuple):
    """Of a step on this rank, in bytes."""

    measured: float
    estimated: int
    gathered: list[list[str]]
    """Which of embeddings and head are whole as the first layer is called, and when its gradient is there."""


def sharded(
    ranks: Ranks, config: Any, *, half: bool, reduces_every_pass: bool, in_root: bool
) -> tuple[Policy, Strategy]:
    """A policy that computes in bfloat16 or not, held as the trainer does; or with the ends in FSDP2's root unit."""
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model, torch.bfloat16 if half else torch.float32, workspace_mib=1)
    with pytest.MonkeyPatch.context() as patch:
        if in_root:
            patch.setattr(parallel, "untied_ends", lambda _: None)
        device = torch.device("cpu")
        return policy, parallel.share_out(
            policy, "fsdp2", ranks, device, offload=False, reduces_every_pass=reduces_every_pass
        )


def measure(
    ranks: Ranks,
    *,
    half: bool = False,
    reduces_every_pass: bool = True,
    tied: bool = False,
    vocabulary: int = 2000,
    in_root: bool = False,
) -> Peak:
    """That of steps after the first."""
    config = tiny_config("llama", **SIZE, vocab_size=vocabulary, tie_word_embeddings=tied)
    policy, strategy = sharded(ranks, config, half=half, reduces_every_pass=reduces_every_pass, in_root=in_root)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    batch = pack(make_pairs((3, 150, 150), (3, 150, 150)), [0, 1])
    gathered: list[list[str]] = []

    def note(*_: Any) -> None:
        model = policy.causal_lm
        ends = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
        gathered.append([name for name, end in ends.items() if not isinstance(end.weight, DTensor)])

    def step() -> list[int]:
        for at in range(PASSES):
            with strategy.micro_batch(last=at == PASSES - 1):
                strategy.module(batch).logps.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return [0]

    step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    tensors = [value.to_local() if isinstance(value, DTensor) else value for value in (*policy.parameters(), *state)]
    peak = sum(tensor.nbytes for tensor in tensors) + allocations_of(step).peak * MIB
    first = policy.causal_lm.model.layers[0]
    first.register_forward_pre_hook(note)
    first.register_full_backward_hook(note)
    strategy.module(batch).logps.sum().backward()
    estimate = estimate_memory(
        shape_of("sharded", config),
        tokens_per_batch=batch.num_slots,
        gradient_checkpointing=True,
        half=half,
        workspace_mib=1,
        cuda=False,
        **strategy.in_estimate,
    )
    return Peak(peak, estimate.peak_bytes, gathered)


def main(path: Path) -> None:
    """Write the peaks of every case that this CPU can compute."""
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    ranks = Ranks(size=2, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=(DATA, TENSOR)))
    units = has_bf16_units(torch.device("cpu"))
    cases = {name: case for name, case in CASES.items() if units or "half" not in case}
    path.write_text(
        json.dumps({name: measure(ranks, **case)._asdict() for name, case in cases.items()}), encoding="utf-8"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
