"""The head alone, forward and backward: exact and filtered streaming against full logits, errors against float64.

    python -m benchmarks.head [--hidden FILE] [--tokens N] [--repeats N] [--out FILE.json]

FILE holds real hidden states (`hidden` bf16 [T, D], `target` [T], `cu_seqlens` [N+1], `weight_int8` [V, D] with
`weight_scale` [V]); without one, random hidden states of the same shapes stand in.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import console, environment, isolated, peak_growth_mib, timed
from benchmarks.replay import SHARED_HIDDEN
from fused_dpo import KernelOptions, fused_dpo_logps, fused_token_logps


class Problem(NamedTuple):
    """Packed hidden states with aligned targets."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    cu_seqlens: Tensor
    upstream: Tensor
    """One gradient a sequence."""


def load_problem(path: str | None, tokens: int) -> Problem:
    """Whole sequences of at most `tokens` tokens in all."""
    generator = torch.Generator().manual_seed(0)
    if path is None:
        V, D, length = 49152, 576, 56
        cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32)
        T = int(cu_seqlens[-1])
        hidden = torch.randn(T, D, generator=generator).bfloat16()
        weight = (torch.randn(V, D, generator=generator) * 0.1).bfloat16()
        target = torch.randint(V, (T,), generator=generator)
    else:
        from safetensors.torch import load_file

        data = load_file(path)
        cu_seqlens = data["cu_seqlens"][data["cu_seqlens"] <= tokens]
        T = int(cu_seqlens[-1])
        hidden, target = data["hidden"][:T].clone(), data["target"][:T].long()
        weight = (data["weight_int8"].float() * data["weight_scale"][:, None]).bfloat16()
    upstream = torch.randn(len(cu_seqlens) - 1, generator=generator)
    return Problem(hidden, weight, target, cu_seqlens, upstream)


def naive_logps(hidden: Tensor, weight: Tensor, target: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What trainers do: logits in the model's dtype, log-softmax of all of them in fp32."""
    logits = hidden @ weight.T
    token_logps = F.log_softmax(logits.float(), dim=-1).gather(1, target[:, None]).squeeze(1)
    lengths = cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return torch.zeros(len(lengths)).index_add(0, sequence, token_logps)


def cut_cross_entropy_logps(hidden: Tensor, weight: Tensor, target: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Cut Cross-Entropy's path for CPUs, compiled by inductor (Wijmans et al., 2024, arXiv 2411.09009)."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    token_losses = linear_cross_entropy(hidden, weight, target, reduction="none", impl="torch_compile")
    return torch.segment_reduce(-token_losses.float(), "sum", offsets=cu_seqlens.long(), unsafe=True)


def streaming(grad_mode: str, filter_eps: float = 2**-12) -> Callable[..., Tensor]:
    """Ours."""

    def logps(hidden: Tensor, weight: Tensor, target: Tensor, cu_seqlens: Tensor) -> Tensor:
        arguments: Any = {"cu_seqlens": cu_seqlens, "shift": False, "grad_mode": grad_mode}
        options = KernelOptions(impl="streaming", filter_eps=filter_eps)
        return fused_dpo_logps(hidden, weight, target, options=options, **arguments)

    return logps


FILTERED = {f"filtered, eps 2^-{bits}": 2.0**-bits for bits in (10, 12, 14)}
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "naive bf16": naive_logps,
    "cut-cross-entropy": cut_cross_entropy_logps,
    "exact": streaming("exact"),
    **{name: streaming("filtered", eps) for name, eps in FILTERED.items()},
}


def truth(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and both gradients in float64, a sequence at a time."""
    hidden, weight = problem.hidden.double().requires_grad_(), problem.weight.double().requires_grad_()
    logps = []
    bounds = problem.cu_seqlens.tolist()
    for start, stop, upstream in zip(bounds[:-1], bounds[1:], problem.upstream.double(), strict=True):
        token_logps = F.log_softmax(hidden[start:stop] @ weight.T, dim=-1)
        logp = token_logps.gather(1, problem.target[start:stop, None]).sum()
        (logp * upstream).backward()
        logps.append(logp.detach())
    assert hidden.grad is not None
    assert weight.grad is not None
    return torch.stack(logps), hidden.grad, weight.grad


def measure(name: str, path: str | None, tokens: int, repeats: int, reference: tuple[Tensor, ...]) -> dict[str, Any]:
    """Time, extra memory and errors of one implementation; to be run in a process of its own."""
    problem = load_problem(path, tokens)
    arguments = problem.target, problem.cu_seqlens

    def run() -> tuple[Tensor, Tensor, Tensor, float, float]:
        hidden = problem.hidden.clone().requires_grad_()
        weight = problem.weight.clone().requires_grad_()
        logps, forward = timed(lambda: IMPLEMENTATIONS[name](hidden, weight, *arguments))
        _, backward = timed(lambda: logps.backward(problem.upstream))
        assert hidden.grad is not None
        assert weight.grad is not None
        return logps.detach(), hidden.grad, weight.grad, forward, backward

    (logps, dhidden, dweight, _, _), peak = peak_growth_mib(run)  # the first run is also the warm-up
    gradients = (problem.hidden.nbytes + problem.weight.nbytes) / 2**20
    times = [run()[3:] for _ in range(repeats)]
    forward, backward = (statistics.median(column) for column in zip(*times, strict=True))
    true_logps, true_dhidden, true_dweight = reference
    filtered = {}
    if name in FILTERED:
        options = KernelOptions(impl="streaming", filter_eps=FILTERED[name])
        stats: Any = {"with_stats": ("tail", "kept_fraction"), "grad_mode": "filtered", "options": options}
        with torch.no_grad():
            scored = fused_token_logps(
                problem.hidden, problem.weight, problem.target, cu_seqlens=problem.cu_seqlens, shift=False, **stats
            )
        assert scored.tail is not None
        assert scored.kept_fraction is not None
        filtered = {"tail": float(scored.tail.mean()), "kept_fraction": float(scored.kept_fraction.mean())}
    return {
        "implementation": name,
        "tokens": len(problem.hidden),
        "sequences": len(problem.upstream),
        "forward_s": forward,
        "backward_s": backward,
        "total_s": forward + backward,
        # Copies of the inputs that stand for a model's own tensors, and the gradients, are not the implementation's.
        "extra_mib": peak - 2 * gradients,
        "worst_logp_error_nat": float((logps.double() - true_logps).abs().max()),
        "dhidden_error": float((dhidden.double() - true_dhidden).norm() / true_dhidden.norm()),
        "dweight_error": float((dweight.double() - true_dweight).norm() / true_dweight.norm()),
        **filtered,
    }


def main() -> None:
    """Measure every implementation and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", help="file of real hidden states (default: the shared one, else random)")
    parser.add_argument("--tokens", type=int, default=4167, help="tokens at most (default: 4167)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, of which the median counts (default: 3)")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    path = options.hidden or (str(SHARED_HIDDEN) if SHARED_HIDDEN.is_file() else None)

    reference = truth(load_problem(path, options.tokens))
    missing = () if find_spec("cut_cross_entropy") else ("cut-cross-entropy",)
    names = [name for name in IMPLEMENTATIONS if name not in missing]
    rows = [isolated(measure, name, path, options.tokens, options.repeats, reference) for name in names]
    problem = "real hidden states" if path else "random hidden states"
    table = Table(title=f"{problem}, {rows[0]['tokens']} tokens, bf16, {environment()['device']}")
    for column in ("", "forward s", "backward s", "total s", "extra MiB", "worst log-prob error", "dH", "dW", "kept"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(
            row["implementation"],
            *(f"{row[key]:.2f}" for key in ("forward_s", "backward_s", "total_s")),
            f"{row['extra_mib']:.0f}",
            f"{row['worst_logp_error_nat']:.2g} nat",
            *(f"{row[key]:.2%}" for key in ("dhidden_error", "dweight_error")),
            f"{row['kept_fraction']:.1%}" if "kept_fraction" in row else "",
        )
    console().print(table)
    for name in missing:
        console().print(f"{name} is not installed: not measured")
    if options.out:
        options.out.write_text(json.dumps({**environment(), "problem": problem, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
