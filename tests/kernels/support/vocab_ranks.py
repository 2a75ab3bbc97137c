"""A head split over ranks beside the same head in one process: torchrun ... -m tests.kernels.support.vocab_ranks FILE.

Each rank computes both and compares what it holds, as bits depend on how many threads multiply.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fused_dpo import KernelOptions, LMHead, fused_token_logps
from fused_dpo.gpu import forward as gpu_forward
from fused_dpo.linalg import gradient_sums
from fused_dpo.streaming import online_softmax
from tests.kernels.support.problems import EVERY_FEATURE, Problem, make_problem

ROWS_OF = ("weight", "bias", "lora_b")
"""Tensors of a head with a row for each token, of which every rank holds its part."""
STATS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs", "tail", "kept_fraction")
Group = dist.ProcessGroup | None


def score(
    problem: Problem, group: Group, *, as_dtensors: bool = False, compiled: bool = False, **call: Any
) -> dict[str, Tensor]:
    """Log-probs, stats and gradients of a problem; of a group's rank the rows that it holds."""
    named = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.tensors.items()}
    vocab_size = None
    if group is not None:
        rank, ranks, vocab_size = dist.get_rank(group), dist.get_world_size(group), len(problem.weight)
        mesh = DeviceMesh.from_group(group, "cpu")
        for name, tensor in problem.tensors.items():
            if as_dtensors and name != "hidden":
                placement = Shard(0) if name in ROWS_OF else Replicate()
                named[name] = distribute_tensor(tensor, mesh, [placement]).requires_grad_()
            elif name in ROWS_OF:
                named[name] = tensor.chunk(ranks)[rank].clone().requires_grad_()
    leaves = replace(problem, **named)
    head = replace(leaves.head, process_group=group, vocab_size=None if as_dtensors else vocab_size)
    function: Any = (
        torch.compile(fused_token_logps, backend="aot_eager", fullgraph=True) if compiled else fused_token_logps
    )
    tokens = function(leaves.hidden, head, problem.labels, cu_seqlens=problem.cu_seqlens, **call)
    upstream = torch.linspace(-1, 1, tokens.logps.numel(), dtype=tokens.logps.dtype).view_as(tokens.logps)
    tokens.logps.backward(upstream)
    results = {name: value.detach() for name, value in tokens._asdict().items() if value is not None}
    for name, leaf in named.items():
        gradient: Any = leaf.grad
        results[f"d{name}"] = gradient.to_local() if as_dtensors and name != "hidden" else gradient
    return results


def compare(problem: Problem, group: dist.ProcessGroup, how: str = "", **call: Any) -> dict[str, Any]:
    """For each result whether it has the bits of one process, and by how much it is off in the largest norm.

    `how` is one of the switches of `score`.
    """
    alone, split = score(problem, None, **call), score(problem, group, **({how: True} if how else {}), **call)
    rank, ranks, found = dist.get_rank(group), dist.get_world_size(group), {}
    for name, whole in alone.items():
        mine = whole.chunk(ranks)[rank] if name.removeprefix("d") in ROWS_OF and name.startswith("d") else whole
        error = (split[name].double() - mine.double()).abs().max() / whole.double().abs().max().clamp(min=1e-30)
        found[name] = (torch.equal(split[name], mine), float(error))
    everywhere: list[Any] = [None] * ranks
    dist.all_gather_object(everywhere, (split["logps"], split["dhidden"]), group=group)
    found["ranks agree"] = all(
        torch.equal(a, b) for other in everywhere for a, b in zip(other, everywhere[0], strict=True)
    )
    return found


@contextmanager
def changed(module: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of a module's name within the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def error_of(work: Callable[[], Any]) -> str:
    """What a call raises, for the test to look at."""
    try:
        work()
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def peaked(problem: Problem) -> Problem:
    """The same with logits that a filter finds something to drop in."""
    return replace(problem, weight=3 * problem.weight)


def cases(group: dist.ProcessGroup) -> dict[str, Any]:
    """Everything that is tried with one group."""
    on_borders, odd = make_problem((5, 60, 1, 23), 8192, 64), make_problem((5, 40, 1, 23))
    everything = make_problem((5, 60, 1, 23), 8192, 61, **EVERY_FEATURE)
    found: dict[str, Any] = {}
    for name, problem in {"borders": on_borders, "odd": odd, "everything": everything}.items():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            rounded = peaked(problem).to(dtype)
            for mode in ("exact", "filtered"):
                found[f"{name} {dtype} {mode}"] = compare(rounded, group, grad_mode=mode, with_stats=STATS)
    found["DTensors"] = compare(everything.to(torch.float32), group, "as_dtensors", grad_mode="exact")
    found["compiled"] = compare(on_borders.to(torch.float32), group, "compiled", grad_mode="filtered")
    nothing = replace(odd, labels=torch.full_like(odd.labels, -100)).to(torch.float32)
    found["nothing scored"] = compare(nothing, group)
    small = {"borders": make_problem((3, 30), 256, 16), "everything": make_problem((3, 30), 256, 13, **EVERY_FEATURE)}
    with changed(gpu_forward, "SPLIT_COLUMNS", 32):
        for name, problem in small.items():
            for impl in ("triton", "library"):
                for mode in ("exact", "filtered"):
                    options = KernelOptions(impl=impl)
                    call = {"grad_mode": mode, "options": options, "with_stats": STATS}
                    found[f"{impl} {name} {mode}"] = compare(peaked(problem).to(torch.float32), group, **call)
        reuse = KernelOptions(impl="triton", reuse_exponentials=True)
        found["exponentials"] = compare(small["borders"].to(torch.float32), group, grad_mode="exact", options=reuse)
    float32 = odd.to(torch.float32)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    other_labels = replace(float32, labels=float32.labels.roll(rank))
    invalid = replace(float32, labels=float32.labels.masked_fill(float32.labels >= 0, 257))
    found["errors"] = {
        "labels": error_of(lambda: score(other_labels, group)),
        "invalid": error_of(lambda: score(invalid, group)),
        "reference": error_of(lambda: score(float32, group, options=KernelOptions(impl="reference"))),
        "rows": error_of(lambda: split_of(float32, group, 300)),
        "columns": error_of(lambda: split_by_columns(float32, group)),
    }
    with changed(gradient_sums, "sum_over_ranks", lambda values, _shard: values):
        found["control: dH of one rank"] = compare(float32, group, grad_mode="exact")
    with changed(online_softmax, "sums_of_ranks", lambda parts, picked, _shard: (parts, picked)):
        found["control: total of one rank"] = compare(float32, group, grad_mode="exact")
    found["ranks"] = ranks
    return found


def split_of(problem: Problem, group: dist.ProcessGroup, vocab_size: int) -> None:
    """With a size that this rank's rows do not belong to."""
    part = problem.weight.chunk(dist.get_world_size(group))[dist.get_rank(group)]
    head = LMHead(part, process_group=group, vocab_size=vocab_size)
    fused_token_logps(problem.hidden, head, problem.labels, cu_seqlens=problem.cu_seqlens)


def split_by_columns(problem: Problem, group: dist.ProcessGroup) -> None:
    """With a DTensor that is not split by tokens."""
    weight: Any = distribute_tensor(problem.weight, DeviceMesh.from_group(group, "cpu"), [Shard(1)])
    fused_token_logps(
        problem.hidden, LMHead(weight, process_group=group), problem.labels, cu_seqlens=problem.cu_seqlens
    )


def main() -> None:
    """Write what is found with two and with four ranks, of each rank, to FILE.RANK."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pairs: Any = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    everybody: Any = dist.new_group()
    found = {2: cases(pairs[rank // 2]), 4: cases(everybody)}
    torch.save(found, f"{sys.argv[1]}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
