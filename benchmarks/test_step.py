"""`pytest benchmarks/test_step.py`: a whole DPO step, each way checked before it is timed.

On a CPU a small case of the demo's model, `--full` for a larger one; on a GPU that model, where it is there, and a
random one of the 1B class. `--model` and `--data` name others, `--results FILE` keeps the rows.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.measure import isolated
from benchmarks.step import WAYS, Logps, build_step, examine, step_cases
from benchmarks.steps.ways import Case, true_logps

ROUNDS = {"cpu": 2, "cuda": 5}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases that the options and this machine ask for."""
    from examples.smollm2 import cache_folder

    options = metafunc.config.option
    device = "cuda" if torch.cuda.is_available() else "cpu"
    demo = cache_folder() / "SmolLM2-135M-Instruct"
    cases: list[Any] = []
    for model in [options.model] if options.model else [str(demo)] + ["random:llama-1b"] * (device == "cuda"):
        data = [options.data] if options.data else []
        missing = model == str(demo) and not (demo / "config.json").is_file()
        reason = f"no model in {demo}; fetch it with `python -m examples.smollm2`, or name one with --model"
        marks = pytest.mark.skipif(missing, reason=reason)
        cases += [
            pytest.param(case, marks=marks, id=case.name)
            for case in step_cases(model, data, full=options.full, device=device)
        ]
    metafunc.parametrize("case", cases)


@cache
def true_logps_of(case: Case) -> Logps:
    """Compute the truth once a case; on a CPU in a process of its own, as memory of this one is not given back."""
    return isolated(true_logps, case) if case.device == "cpu" else true_logps(case)


@pytest.mark.parametrize("way", WAYS)
def test_step(case: Case, way: str, time_row: Callable[..., None], refuse: Callable[..., None]) -> None:
    """Check a way, with its memory, then time it."""
    true = true_logps_of(case)
    if case.device == "cpu":
        row, step = isolated(examine_alone, case, way, true), None
    else:
        row, step = examine(case, way, true)
    if "failed" in row:
        refuse(row, row["failed"])
    time_row(row, step or build_step(case, way, true), rounds=ROUNDS[case.device])


def examine_alone(case: Case, way: str, true: Logps) -> dict[str, Any]:
    """The row alone, with the memory of a process of its own."""
    return examine(case, way, true)[0]
