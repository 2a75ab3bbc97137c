"""Everything that needs a GPU, in one command of under 9 minutes, from a bare checkout with torch and triton alone.

    python -m benchmarks.gpu_suite --out DIR [--minutes 9]

Checks first, then timings, the most telling cases first. A part that fails or finds no time left is recorded and the
next one begins; DIR/gpu_suite.json is written anew after every part.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "kernels"))  # a bare checkout has nothing installed

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from benchmarks.gpu_checks import CHECKS, SMALL, NotHereError, Scale  # noqa: E402
from benchmarks.replay import Replay, describe, replay  # noqa: E402
from fused_dpo import KernelOptions, fused_token_logps  # noqa: E402

SHAPES = ((8192, 4096, 151936), (16384, 4096, 128256))
"""N scored tokens, D, V: the heads of Qwen3-8B and Llama-3-8B."""


def ceilings() -> dict[str, float]:
    """What this very card reaches: a large copy, and a large bf16 product of random numbers."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    matmul_ms = median_ms(lambda: a @ b)
    return {"copy_tb_s": 2 * source.nbytes / copy_ms / 1e9, "matmul_tflop_s": 2 * 8192**3 / matmul_ms / 1e9}


def median_ms(function: Callable[[], Any], runs: int = 10, seconds: float = 4.0) -> float:
    """Median time by device events after a warm-up, within a time limit."""
    function()
    torch.cuda.synchronize()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < runs and (time.perf_counter() - started < seconds or len(times) < 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def naive_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Full logits, log-softmax in fp32, a log-prob per token."""
    return F.log_softmax((hidden @ weight.T).float(), dim=-1).gather(1, labels[:, None]).squeeze(1)


def truth(problem: Replay, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the tokens, and the gradients for `upstream` [N], in float64, some rows at a time."""
    weight = problem.weight.double()
    logps, dhidden, dweight = [], [], torch.zeros_like(weight)
    for hidden, target, g in zip(
        problem.hidden.split(512), problem.target.split(512), upstream.split(512), strict=True
    ):
        rows = hidden.double()
        log_p = (rows @ weight.T).log_softmax(-1)
        logps.append(log_p.gather(1, target[:, None]).squeeze(1))
        dz = log_p.exp_().neg_()
        dz[torch.arange(len(target), device=dz.device), target] += 1.0
        dz *= g.double()[:, None]
        dhidden.append(dz @ weight)
        dweight += dz.T @ rows
    return torch.cat(logps), torch.cat(dhidden), dweight


def relative_error(got: Tensor, true: Tensor) -> float:
    """In the Frobenius norm, a piece at a time: a float64 copy of a gradient is large."""
    squares = sum((a.double() - b).square().sum() for a, b in zip(got.split(8192), true.split(8192), strict=True))
    return float((squares / true.square().sum()) ** 0.5)


def timings(N: int, D: int, V: int, hidden_file: Path | None) -> Iterator[dict[str, Any]]:
    """A row an implementation: milliseconds, extra memory and errors, forward and forward + backward."""
    problem = replay(N, D, V, hidden_file=hidden_file, device="cuda")
    yield {"implementation": "problem", "source": problem.source, **describe(problem)}
    hidden, weight, labels = problem.hidden.requires_grad_(), problem.weight.requires_grad_(), problem.target
    offsets = torch.arange(0, N + 1, 64, device="cuda", dtype=torch.int32)
    upstream = torch.randn(N // 64, device="cuda").repeat_interleave(64)
    options = KernelOptions(impl="triton", row_index=torch.arange(N, device="cuda"))
    pass_flop = 2 * N * D * V

    def ours(mode: str) -> Callable[[], Tensor]:
        arguments: Any = {"cu_seqlens": offsets, "shift": False, "grad_mode": mode, "options": options}
        return lambda: fused_token_logps(hidden, weight, labels, **arguments).logps

    compiled = torch.compile(naive_logps)
    implementations: dict[str, Callable[[], Tensor]] = {
        "fused filtered": ours("filtered"),
        "fused exact": ours("exact"),
        "naive": lambda: naive_logps(hidden, weight, labels),
        "torch.compile naive": lambda: compiled(hidden, weight, labels),
    }

    def bare_matmuls() -> None:
        with torch.no_grad():
            dz = hidden @ weight.T
            torch.mm(dz, weight)
            torch.mm(dz.T, hidden)

    with torch.no_grad():
        one = median_ms(lambda: hidden @ weight.T)
        true_logps, true_dhidden, true_dweight = truth(problem, upstream)
    yield {"implementation": "bare matmul", "forward_ms": one, "tflop_s": pass_flop / one / 1e9}
    three = median_ms(bare_matmuls)
    yield {"implementation": "three bare matmuls", "total_ms": three, "tflop_s": 3 * pass_flop / three / 1e9}
    for name, function in implementations.items():
        row: dict[str, Any] = {"implementation": name}
        try:
            with torch.no_grad():
                row["forward_ms"] = median_ms(function)

            def step(call: Callable[[], Tensor] = function) -> Tensor:
                hidden.grad = weight.grad = None
                logps = call()
                logps.backward(upstream)
                return logps.detach()

            row["total_ms"] = median_ms(step)
            hidden.grad = weight.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            logps = step()
            torch.cuda.synchronize()
            gradients = hidden.nbytes + weight.nbytes
            row["extra_gib"] = (torch.cuda.max_memory_allocated() - before - gradients) / 2**30
            row["forward_share_of_bare_matmul"] = one / row["forward_ms"]
            row["total_over_three_matmuls"] = row["total_ms"] / three
            sequences = (logps.double() - true_logps).view(-1, 64).sum(1)
            row["worst_sequence_error_nat"] = float(sequences.abs().max())
            assert hidden.grad is not None
            assert weight.grad is not None
            row["dhidden_error"] = relative_error(hidden.grad, true_dhidden)
            row["dweight_error"] = relative_error(weight.grad, true_dweight)
        except Exception as error:  # out of memory, a compiler that fails: the other rows still count
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        yield row
        torch.cuda.empty_cache()
    arguments: Any = {
        "cu_seqlens": offsets,
        "shift": False,
        "with_stats": ("tail", "kept_fraction"),
        "options": options,
    }
    with torch.no_grad():
        stats = fused_token_logps(hidden, weight, labels, grad_mode="filtered", **arguments)
    assert stats.tail is not None
    assert stats.kept_fraction is not None
    yield {
        "implementation": "fused filtered: what its forward keeps",
        "tail": float(stats.tail.mean()),
        "kept_fraction": float(stats.kept_fraction.mean()),
    }


def sanitizer() -> dict[str, Any]:
    """A small case under compute-sanitizer's memcheck and racecheck, where the tool is there."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise NotHereError("compute-sanitizer is not installed")
    code = (
        "import benchmarks.gpu_suite, torch\n"
        "from benchmarks.gpu_checks import *\n"
        "scale = Scale(lengths=(1, 63, 130), V=5003, D=200)\n"
        "for dtype in scale.dtypes:\n"
        "    evaluate(make_case(scale, dtype, V=scale.V, D=scale.D, extras=True), Case.logps)\n"
        "torch.cuda.synchronize()\n"
    )
    record = {}
    for mode in ("memcheck", "racecheck"):
        command = [tool, "--tool", mode, "--error-exitcode", "9", sys.executable, "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=150)
        record[mode] = {"exit": result.returncode, "output": (result.stdout + result.stderr)[-600:]}
        assert result.returncode == 0, f"{mode}: exit {result.returncode}: {record[mode]['output']}"
    return record


def environment() -> dict[str, Any]:
    """Device, versions and commit."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "none",
        "capability": torch.cuda.get_device_capability() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "commit": commit or "unknown",
    }


def parts(scale: Scale, hidden_file: Path | None) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and work of every part, in order."""
    for name, check in CHECKS.items():
        yield f"check: {name}", lambda check=check: check(scale)
    if scale.device != "cuda":
        return
    yield "ceilings", ceilings
    for shape in SHAPES:
        yield "timings N={} D={} V={}".format(*shape), lambda shape=shape: list(timings(*shape, hidden_file))
    yield "compute-sanitizer", sanitizer


def run(out: Path, minutes: float, scale: Scale, hidden_file: Path | None = None) -> dict[str, Any]:
    """Run all parts within the time and write the record after each."""
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"environment": environment(), "parts": {}}
    started = time.perf_counter()
    for name, work in parts(scale, hidden_file):
        if time.perf_counter() - started > 60 * minutes:
            entry: dict[str, Any] = {"status": "no time left"}
        else:
            begun = time.perf_counter()
            try:
                entry = {"status": "ok", "result": work()}
            except NotHereError as reason:
                entry = {"status": "skipped", "error": str(reason)}
            except Exception as error:
                traceback.print_exc()
                entry = {"status": "failed", "error": f"{type(error).__name__}: {str(error)[:1000]}"}
            entry["seconds"] = time.perf_counter() - begun
        record["parts"][name] = entry
        print(f"{entry['status']:<12} {name}  {json.dumps(entry.get('result') or entry.get('error', ''))}", flush=True)
        (out / "gpu_suite.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def main() -> int:
    """Command line of the module: exit status 0 if every part ran and passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_suite.json")
    parser.add_argument("--minutes", type=float, default=8.5, help="begin no part after so many minutes (default: 8.5)")
    parser.add_argument(
        "--hidden", type=Path, help="file of real hidden states (default: the shared one, else synthetic)"
    )
    parser.add_argument("--interpreter", action="store_true", help="the checks alone, small, in Triton's interpreter")
    options = parser.parse_args()
    if not options.interpreter and not torch.cuda.is_available():
        print("no CUDA device; --interpreter runs the checks without one", file=sys.stderr)
        return 2
    record = run(options.out, options.minutes, SMALL if options.interpreter else Scale(), options.hidden)
    failed = [name for name, entry in record["parts"].items() if entry["status"] not in ("ok", "skipped")]
    skipped = [name for name, entry in record["parts"].items() if entry["status"] == "skipped"]
    passed = len(record["parts"]) - len(failed) - len(skipped)
    print(f"{passed} passed, {len(failed)} failed or without time {failed}, {len(skipped)} skipped {skipped}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
