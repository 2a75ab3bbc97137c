"""One DPO step of a model on real pairs: packed with shared prefixes against packed, padded, full logits, and TRL.

    python -m benchmarks.step --model DIR [--data FILE ...] [--pairs N] [--tokens-per-batch N] [--dtype auto]
                              [--device auto] [--ways NAME ...] [--repeats N] [--out FILE]
    python -m benchmarks.step --model random:llama-1b [--data hh_helpful ...] ...

Ways over the same pairs, forward and backward without optimizer, every forward pass within the same number of token
slots; on a CPU each in a process of its own:
  shared             packed, prefixes computed once, `fused_dpo_logps`: the trainer's default
  packed             the same with `--no-prefix-sharing`
  padded             the same with `--no-packing`: `[2B, S, D]` hidden states, transformers' own attention
  ..., exact         the same with the head's exact gradients instead of the filtered ones
  packed logits      as packed, but full logits and a log-softmax in fp32
  padded logits      as padded, but full logits and a log-softmax in fp32
  TRL                its DPOTrainer's training step, padded, with the head it has (see `benchmarks.steps.trl`)
  TRL, compact       the same, scoring what counts alone, as TRL 1.15 does and 1.16 where it has Triton
  TRL, checkpointed  the same with gradient checkpointing, its default

The log-probs of every sequence are compared with those of the model in float32, one sequence at a time, before a way is
given a time; these are also what the reference gives, as at the start of a training run. The exit status is 1 if every
way failed.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.arguments import out_file, positive_int
from benchmarks.measure import compute_dtype, console, cuda_growth_mib, isolated, peak_growth_mib, quantiles, timed
from benchmarks.reporting import records
from benchmarks.steps.random_model import MIX, PREFIX
from benchmarks.steps.trl import TRL, TrlStep, absent
from benchmarks.steps.ways import OURS, Case, Outcome, OwnStep, true_logps
from fused_dpo_engine.config.options import ModelOptions
from fused_dpo_engine.errors import first_line
from fused_dpo_engine.model.loading import choose_device, dtype_warning

WAYS = (*OURS, *TRL)
PREFERENCES = Path(__file__).parents[1] / "examples" / "preferences.jsonl"
TOKEN_RMS_NAT = {"bfloat16": 0.1, "float32": 1e-3}
"""Bound on a way's log-probs: root mean square over the sequences of error / sqrt(scored tokens). A bf16 backbone makes
0.02 to 0.03 on SmolLM2, with bf16 logits up to 0.06; positions that are not reset make 0.65, a wrong last token 1.9."""
WORST_NAT = {"bfloat16": 0.3, "float32": 3e-3}
"""Bound on error / sqrt(scored tokens) of any one sequence; up to 0.12 is seen, and 1.6 and 2.9 of those wrong ways."""

Step = OwnStep | TrlStep
Logps = list[list[float]]
"""Log-probs [P][2] of the chosen and rejected sequences."""


def build_step(case: Case, way: str, true: Logps) -> Step:
    """Build the step, ready to be taken, the reference giving the true log-probs."""
    pairs, ref_logps = case.token_pairs(), torch.tensor(true)
    return TrlStep(case, TRL[way], pairs, ref_logps) if way in TRL else OwnStep(case, OURS[way], pairs, ref_logps)


def logp_errors(logps: Tensor, true: Tensor, lengths: Tensor) -> dict[str, float]:
    """Measure the errors [nat] of log-probs [P, 2] of sequences with `lengths` [P, 2] scored tokens.

    Roundings of the backbone differ from token to token, so their sum over a sequence grows as the root of its length.
    """
    error = (logps.cpu() - true).double()
    a_token = error / lengths.sqrt()
    return {
        "worst_logp_difference": float(error.abs().max()),
        "rms_logp_difference": float(error.square().mean().sqrt()),
        "worst_difference_per_root_token": float(a_token.abs().max()),
        "token_logp_rms_nat": float(a_token.square().mean().sqrt()),
    }


def wrong(errors: dict[str, float], dtype: str) -> str | None:
    """Say why log-probs with such errors count as those of another computation, if they do; not a number does."""
    bounds = {"token_logp_rms_nat": TOKEN_RMS_NAT[dtype], "worst_difference_per_root_token": WORST_NAT[dtype]}
    over = [name for name, most in bounds.items() if not errors[name] <= most]
    return ", ".join(f"{name} {errors[name]:.3g} over {bounds[name]:g}" for name in over) or None


def extra_memory(step: Step, device: str) -> tuple[Outcome, float]:
    """Take a step; MiB at its peak beyond those before it, gradients too: of CUDA's allocator, or of the process.

    On CUDA a step is taken before, as libraries allocate in their first call and kernels are compiled; on a CPU freed
    memory stays with the process, so that only the first step shows what it takes.
    """
    if device == "cpu":
        return peak_growth_mib(step)
    step()
    step.model.zero_grad()
    torch.cuda.empty_cache()
    return cuda_growth_mib(step)


def row_of(case: Case, way: str) -> dict[str, Any]:
    """Name a row."""
    return {"id": f"step/{case.name}/{way}", "suite": "step", "implementation": way, **case.describe()}


def examine(case: Case, way: str, true: Logps) -> tuple[dict[str, Any], Step | None]:
    """Check a way; returns its row without times, and the step to time: None, and `failed` in the row, if it gets none.

    Args:
        case: the step.
        way: one of WAYS.
        true: what `true_logps` gives.
    """
    gc.collect()  # trainers are full of reference cycles
    row = row_of(case, way)
    if way in TRL and (reason := absent()):
        return row | {"failed": reason}, None
    step = build_step(case, way, true)
    outcome, extra_mib = extra_memory(step, case.device)
    lengths = torch.tensor([(pair.chosen_length, pair.rejected_length) for pair in step.pairs])
    errors = logp_errors(outcome.logps, torch.tensor(true), lengths)
    row |= {"pairs": len(step.pairs), **step.describe(), "extra_mib": extra_mib, **errors, "loss": float(outcome.loss)}
    if reason := wrong(errors, case.dtype):
        return row | {"failed": f"not the same log-probs: {reason}"}, None
    return row, step


def measure(case: Case, way: str, true: Logps, rounds: int) -> dict[str, Any]:
    """Make the row of a way with the times of `rounds` steps after the one checked; on a CPU in a fresh process."""
    row, step = examine(case, way, true)
    if step is None or not rounds:
        return row

    def run() -> None:
        step()
        if case.device != "cpu":
            torch.cuda.synchronize()

    row |= quantiles([timed(run)[1] for _ in range(rounds)])
    return row | {"tokens_per_s": row["tokens"] / row["median_s"]}


def rows(
    case: Case, ways: Sequence[str], rounds: int, announce: Callable[[str], None] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """Walk the rows, one a way, as they come; one that fails, or computes something else, says so in `failed`.

    On a CPU each way has a process of its own. What begins is announced.
    """
    call: Callable[..., Any] = isolated if case.device == "cpu" else _here
    announce("log-probs in float32, one sequence at a time, to compare with")
    true, reason = _tried(call, true_logps, case)
    for way in ways:
        announce(f"{way}: a step to check, {rounds} to time")
        row = None
        if true is not None:  # out of memory, another release of a trainer: the other ways still count
            row, reason = _tried(call, measure, case, way, true, rounds)
        yield row or row_of(case, way) | {"failed": reason}


def _tried(call: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """Call a function; returns the result, or None and why there is none."""
    try:
        return call(*arguments), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error)[:300]}"


def _here(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in this process, and leave nothing on the device."""
    try:
        return function(*arguments)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def step_cases(model: str, data: Sequence[str], *, full: bool, device: str) -> list[Case]:
    """List the cases of `pytest benchmarks/` and of a GPU: without `full` a small one on a CPU, on a GPU large ones."""
    chosen = data or ([MIX] if model.startswith(PREFIX) else [str(PREFERENCES)])
    pairs, budget = (64, 16384) if device != "cpu" else (16, 8192) if full else (4, 1024)
    return [Case(model, name, pairs, budget, compute_dtype(device), device) for name in chosen]


def gpu_rows(
    model: str,
    data: Sequence[str] = (),
    *,
    ways: Sequence[str] = WAYS,
    rounds: int = 5,
    hidden_file: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Walk the rows, one a way on this process's GPU, for every data set; a way that fails has a row with `failed`.

    Args:
        model: as `Case.model`.
        data: as `Case.data`; by default the pairs in `examples/`, or the lengths of hh_helpful for a random model.
        ways: of WAYS.
        rounds: timed steps, after the one that is checked.
        hidden_file: of real hidden states, for a random model.
    """
    for case in step_cases(model, data, full=True, device="cuda"):
        yield from rows(replace(case, hidden_file=hidden_file), ways, rounds)


def compare(
    model: str,
    data: str,
    pairs: int,
    budget: int,
    dtype: str,
    repeats: int,
    ways: Sequence[str] = WAYS,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Measure the ways, saying which as they begin, and print them side by side."""
    from rich.table import Table

    started = time.perf_counter()

    def announce(what: str) -> None:
        print(f"   {time.perf_counter() - started:4.0f} s  {what}", flush=True)

    measured = list(rows(Case(model, data, pairs, budget, dtype, device), ways, repeats, announce))
    done = [row for row in measured if "failed" not in row]
    tokens = f", {done[0]['tokens']} tokens" if done else ""
    table = Table(title=f"one step on {pairs} pairs{tokens}, {dtype}, {Path(data).name}")
    columns = ("token slots", "loss", "log-prob off", "seconds", "extra memory", "time", "memory")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for row in measured:
        if "failed" in row:
            table.add_row(row["implementation"], row["failed"])
            continue
        ratios = (f"{row[key] / done[0][key]:.2f}" for key in ("median_s", "extra_mib"))
        table.add_row(
            row["implementation"],
            str(row["slots"]),
            f"{row['loss']:.5f}",
            f"{row['worst_logp_difference']:.4f}",
            f"{row['median_s']:.1f}" if row["median_s"] >= 1 else f"{row['median_s']:.3f}",
            f"{row['extra_mib'] / 1024:.2f} GiB",
            *ratios,
        )
    if done:
        first = done[0]["implementation"]
        table.caption = f"log-probs compared with float32, one by one; time and memory over those of {first}"
    console().print(table)
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of the module: exit status 1 if no way got a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder, Hugging Face name or random:NAME")
    parser.add_argument(
        "--data",
        nargs="+",
        help="preference pairs, several files one after the other; for a random model, names in lengths.json "
        "(default: examples/preferences.jsonl or hh_helpful)",
    )
    parser.add_argument("--pairs", type=positive_int, default=16, help="pairs in the step (default: 16)")
    parser.add_argument(
        "--tokens-per-batch",
        type=positive_int,
        default=8192,
        help="tokens per forward, of which a sequence may have half (default: 8192)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
        help="dtype to compute in; auto: bfloat16 where the device has units for it, else float32",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="which (default: all)")
    parser.add_argument(
        "--repeats", type=positive_int, default=3, help="timed steps, of which the median counts (default: 3)"
    )
    parser.add_argument("--out", type=out_file, help="write the rows to this results file")
    options = parser.parse_args(arguments)
    mixes = options.data or [MIX if options.model.startswith(PREFIX) else str(PREFERENCES)]
    try:
        asked = ModelOptions(model=options.model, device=options.device, dtype=options.dtype)
        device = str(choose_device(asked))
        warning = dtype_warning(asked, torch.device(device))
        dtype = compute_dtype(device) if options.dtype == "auto" else options.dtype
        for data in mixes:
            Case(options.model, data, options.pairs, options.tokens_per_batch).token_pairs()
    except ValueError as error:  # no such device, model or data; too few pairs, or none that fits
        parser.error(first_line(error))
    if warning:
        print(warning, file=sys.stderr, flush=True)
    measured = []
    for data in mixes:
        settings = (options.pairs, options.tokens_per_batch, dtype, options.repeats, options.ways, device)
        measured += compare(options.model, data, *settings)
    if options.out:
        records.write(options.out, measured)
    return 1 if all("failed" in row for row in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
