"""Everything that needs a GPU, in one command, from a bare checkout with torch and triton alone.

    python -m benchmarks.gpu_suite --out DIR [--minutes 8.5] [--hidden FILE] [--model DIR]

Checks in the dtype that is timed first, then timings, the most telling cases first, variants of the kernels
(`benchmarks.tuning`), whole steps, and the other checks. Once the minutes are over it begins no part, and no row after
a finished one; what was begun is finished, but for compute-sanitizer, which is stopped. A part that fails, finds no
time left or is cut short is recorded, and the next one begins, in a new process if the old one has lost the device or
hangs. --hidden needs the package safetensors, and the step of a model the trainer's requirements. DIR/gpu_suite.json,
what each part said, and DIR/gpu_rows.json, the measurements as a results file for `benchmarks.report` and
`benchmarks.compare`, are written as they come.
"""

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.arguments import hidden_file, out_folder, positive
from benchmarks.gpu.checks import CHECKS, LATE, OF_DTYPES
from benchmarks.gpu.problems import SMALL, NotHereError, Scale
from benchmarks.gpu.supervise import BEGUN, RECORD, DeviceLostError, device_is_lost, supervised, write_record
from benchmarks.heads import run as head
from benchmarks.heads.cases import AXES, BARE, LOSS, SCALED, STAGED, TRAIN, Case, head_cases, scaling_cases
from benchmarks.heads.peers import IMPLEMENTATIONS
from benchmarks.heads.stages import stages_of
from benchmarks.measure import environment, median_seconds, quantiles, seconds_of
from benchmarks.reporting import records
from benchmarks.tuning import DEVICE, VARIANTS, tuned
from fused_dpo.gpu.launch import interpreted

NAMES = (BARE, *IMPLEMENTATIONS)
OURS = (BARE, *(name for name in IMPLEMENTATIONS if name.startswith("fused")))
"""Whose rows fail the part if they fail; others may not be installed, or run out of memory."""
COMPILED = ("torch.compile naive",)
"""What takes the compiler half a minute a case: left for the end, and measured on the main case alone."""
ROWS = "gpu_rows.json"
RANDOM_MODEL = "random:llama-1b"
Row = dict[str, Any]
SANITIZER_MODES = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}
"""Tools of compute-sanitizer, and the environment that each needs. Within the blocks that torch's allocator caches,
memcheck sees no access that leaves a tensor."""
SANITIZER_SECONDS = 20.0
"""A tool is not begun with less time left: importing torch under it takes most of that."""


def ceilings() -> dict[str, float]:
    """Measure what this very card reaches: a large copy, and a large bf16 product of random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    seconds_of(lambda: a @ b, runs=200, limit=0.5)  # until the clocks have risen
    matmul = statistics.median(seconds_of(lambda: a @ b, runs=50))
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source))
    return {"copy_tb_s": 2 * source.nbytes / copy / 1e12, "matmul_tflop_s": 2 * 8192**3 / matmul / 1e12}


def head_rows(
    case: Case, phase: str, hidden_file: Path | None, names: Sequence[str] = NAMES, **which: str
) -> Iterator[Row]:
    """Make a row an implementation: checked against float64, then memory and time; one that fails says why."""
    loaded = head.load(case, hidden_file, DEVICE)
    bare_run = head.bare_matmuls(case, phase, loaded.problem)
    bare = 0.0
    for name in names:
        if phase != LOSS and name != BARE and IMPLEMENTATIONS[name].logps is None:
            continue  # has a loss only
        if name == BARE or name.startswith("fused") or not bare:
            bare = median_seconds(bare_run)  # the machine's speed at this moment
        row: Row = {"id": f"head/{case.name}/{phase}/{name}", "suite": "head", **which}
        row |= head.describe_row(name, case, phase, loaded)
        try:
            run = bare_run if name == BARE else head.checked(row, name, case, phase, hidden_file, DEVICE)
            row |= quantiles(seconds_of(run))
        except head.NoTimeError as reason:
            row["failed"] = str(reason)
        else:
            row |= {"tokens_per_s": case.N / row["median_s"], **head.rates(case, phase, row["median_s"], bare)}
        yield row
        torch.cuda.empty_cache()


def scaling_rows(axis: str, hidden_file: Path | None) -> Iterator[Row]:
    """Make the points of the curves along one axis."""
    for case in scaling_cases(axis, gpu=True):
        for row in head_rows(case, TRAIN, hidden_file, SCALED, suite="scaling", axis=axis):
            yield row | {"id": f"scaling/{axis}/{getattr(case, axis)}/{row['implementation']}"}


def stage_rows(hidden_file: Path | None) -> Iterator[Row]:
    """Make rows of the seconds by kernel of the main case."""
    case, phase = head_cases(gpu=True)[0]
    loaded = head.load(case, hidden_file, DEVICE)
    for name in STAGED:
        yield from stages_of(case.name, name, head.prepare(name, case, phase, loaded))


def step_rows(model: str, hidden_file: Path | None) -> Iterator[Row]:
    """Make a row a way of whole steps of a model."""
    try:
        from benchmarks.step import gpu_rows
    except ImportError as missing:
        raise NotHereError(f"the trainer's requirements are not installed: {missing}") from None
    yield from gpu_rows(model, hidden_file=hidden_file)


def sanitizer(deadline: float = math.inf) -> dict[str, Any]:
    """Run a small case under compute-sanitizer, where it is there, until `deadline` of `time.perf_counter`.

    Memcheck sees reads and writes outside of what was allocated, racecheck races in shared memory only.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise NotHereError("compute-sanitizer is not installed")
    code = (
        "import benchmarks.gpu_suite, torch\n"
        "from benchmarks.gpu.problems import *\n"
        "scale = Scale(lengths=(1, 63, 130), V=5003, D=200)\n"
        "for dtype in scale.dtypes:\n"
        "    for _, way, case in cases_of(scale, dtype, extras=True):\n"
        "        evaluate(case, way)\n"
        "torch.cuda.synchronize()\n"
    )
    record: dict[str, Any] = {}
    for mode, variables in SANITIZER_MODES.items():
        seconds = deadline - time.perf_counter()
        if seconds < SANITIZER_SECONDS:
            done = f"after {', '.join(record)}, " if record else ""
            raise NotHereError(f"{done}{max(seconds, 0):.0f} s are left, too few for {mode}")
        command = [tool, "--tool", mode, "--error-exitcode", "9", sys.executable, "-c", code]
        status, output = bounded(command, variables, seconds)
        if status is None:
            raise TimeoutError(f"{mode} took longer than the {seconds:.0f} s that were left")
        record[mode] = {"exit": status, "output": output[-600:]}
        assert status == 0, f"{mode}: exit {status}: {record[mode]['output']}"
    return record


def bounded(command: Sequence[str], variables: dict[str, str], seconds: float) -> tuple[int | None, str]:
    """Run a command with these variables; returns exit status and output, status None if it was stopped for time."""
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    environ = {**os.environ, **variables}
    # In a session of its own: what the command starts has to end with it.
    with subprocess.Popen(
        command, stdout=pipe, stderr=both, text=True, cwd=ROOT, env=environ, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=None if math.isinf(seconds) else seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, ""
    return process.returncode, output


def parts(
    scale: Scale, hidden_file: Path | None = None, model: str | None = None, deadline: float = math.inf
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and work of every part, in order; `deadline` is for the one that can be stopped."""
    scale = replace(scale, hidden_file=hidden_file)
    if scale.device != "cuda":
        for name, check in CHECKS.items():
            yield f"check: {name}", lambda check=check: check(scale)
        return
    timed, others = replace(scale, dtypes=scale.dtypes[:1]), replace(scale, dtypes=scale.dtypes[1:])
    for name, check in CHECKS.items():
        if name not in LATE:
            yield f"check: {name}", lambda check=check: check(timed)
    yield "ceilings", ceilings
    (main, phase), *cases = head_cases(gpu=True)
    soon = [name for name in NAMES if name not in COMPILED]
    yield f"head {main.name} {phase}", lambda: head_rows(main, phase, hidden_file, soon)
    yield "stages", lambda: stage_rows(hidden_file)
    yield "tuning", lambda: tuned(VARIANTS, main, hidden_file)
    yield f"step {RANDOM_MODEL}", lambda: step_rows(RANDOM_MODEL, hidden_file)
    for case, phase in cases[:2]:
        yield f"head {case.name} {phase}", lambda case=case, phase=phase: head_rows(case, phase, hidden_file, soon)
    for name in OF_DTYPES:
        yield f"check: {name}, other dtypes", lambda name=name: CHECKS[name](others)
    for name in LATE:
        yield f"check: {name}", lambda name=name: CHECKS[name](scale)
    if model:
        yield f"step {model}", lambda: step_rows(model, hidden_file)
    yield f"compiled {main.name} {TRAIN}", lambda: head_rows(main, TRAIN, hidden_file, COMPILED)
    for case, phase in cases[2:]:
        yield f"head {case.name} {phase}", lambda case=case, phase=phase: head_rows(case, phase, hidden_file, soon)
    for axis in AXES:
        yield f"scaling with {axis}", lambda axis=axis: scaling_rows(axis, hidden_file)
    yield "compute-sanitizer", lambda: sanitizer(deadline)


def run(
    out: Path,
    minutes: float,
    scale: Scale,
    hidden_file: Path | None = None,
    model: str | None = None,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Run all parts that can be begun within the time, and write the record before and after each.

    With `resume` those that the record in `out` has are left out.

    Raises:
        DeviceLostError: after a part that failed the device answers no more.
    """
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"environment": environment(), "parts": {}}
    rows: list[Row] = []
    if resume:
        record = json.loads((out / RECORD).read_text())
        rows = list(records.read(out / ROWS).rows.values()) if (out / ROWS).exists() else []
    deadline = time.perf_counter() + 60 * minutes
    for name, work in parts(scale, hidden_file, model, deadline):
        if name in record["parts"]:
            continue
        begun = time.perf_counter()
        entry: dict[str, Any] = {"status": "no time left"}
        if begun < deadline:
            record["parts"][name] = {"status": BEGUN}
            write_record(out, record)
            try:
                result = work()
                entry = {"status": "ok", "result": result}
                if isinstance(result, Iterator):
                    entry["result"] = lines = []
                    of_part: list[Row] = []
                    for row in result:
                        of_part.append(row)
                        rows.append(row)
                        lines.append(records.summary(row))
                        records.write(out / ROWS, rows)
                        if time.perf_counter() > deadline:
                            entry["status"] = "cut short"
                            break
                    missing = records.failed(of_part, OURS)
                    if missing or (of_part and all("failed" in row for row in of_part)):
                        entry |= {"status": "failed", "error": f"no time for {', '.join(missing) or 'any'}"}
            except NotHereError as reason:
                entry = {"status": "skipped", "error": str(reason)}
            except Exception as error:
                traceback.print_exc()
                entry = {"status": "failed", "error": f"{type(error).__name__}: {str(error)[:1000]}"}
            entry["seconds"] = time.perf_counter() - begun
        record["parts"][name] = entry
        said = json.dumps(entry.get("error") or entry.get("result", ""))
        print(f"{entry['status']:<12} {name}  {said}", flush=True)
        write_record(out, record)
        if entry["status"] == "failed" and device_is_lost():
            raise DeviceLostError
    return record


def main() -> int:
    """Run the command line of the module: exit status 0 if every part ran and passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_folder, required=True, help="folder for gpu_suite.json")
    parser.add_argument(
        "--minutes", type=positive, default=8.5, help="begin nothing after so many minutes (default: 8.5)"
    )
    hidden_help = "file of real hidden states; needs safetensors (default: the shared one, else synthetic)"
    parser.add_argument("--hidden", type=hidden_file, help=hidden_help)
    parser.add_argument("--model", help="model folder for the whole step, beside one of random weights (default: none)")
    parser.add_argument("--interpreter", action="store_true", help="the checks alone, small, in Triton's interpreter")
    parser.add_argument("--process", choices=("begin", "resume"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.interpreter and options.hidden:
        parser.error("--interpreter checks problems smaller than any real hidden states; leave out --hidden")
    if not options.interpreter and not torch.cuda.is_available():
        print("no CUDA device; --interpreter runs the checks without one", file=sys.stderr)
        return 2
    if options.interpreter:
        if not interpreted():  # which triton chooses when it is imported
            command = [sys.executable, "-m", "benchmarks.gpu_suite", *sys.argv[1:]]
            return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
        return verdict(run(options.out, options.minutes, SMALL))
    if options.process:
        resume = options.process == "resume"
        run(options.out, options.minutes, Scale(), options.hidden, options.model, resume=resume)
        return 0
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(options.out)]
    for name in ("hidden", "model"):
        if value := getattr(options, name):
            command += [f"--{name}", str(value)]
    supervised(command, options.out, options.minutes)
    return verdict(json.loads((options.out / RECORD).read_text()))


def verdict(record: dict[str, Any]) -> int:
    """Print the last line, and give the exit status."""
    failed = [name for name, entry in record["parts"].items() if entry["status"] not in ("ok", "skipped")]
    skipped = [name for name, entry in record["parts"].items() if entry["status"] == "skipped"]
    passed = len(record["parts"]) - len(failed) - len(skipped)
    print(f"{passed} passed, {len(failed)} failed or without time {failed}, {len(skipped)} skipped {skipped}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
