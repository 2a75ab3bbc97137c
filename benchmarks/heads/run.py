"""One implementation of the head on one case: what is timed, what comes out of it, and the memory it takes."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.heads.cases import FORWARD, LOSS, TRAIN, Case
from benchmarks.heads.peers import BETA, IMPLEMENTATIONS, Implementation
from benchmarks.heads.replay import Replay, describe
from benchmarks.heads.truth import Truth, gradient_errors, logp_errors, over_budget, truth, upstream
from benchmarks.measure import cuda_growth_mib, isolated, peak_growth_mib, timed
from fused_dpo import KernelOptions, fused_token_logps


class Loaded(NamedTuple):
    """A case's tensors and their truth."""

    problem: Replay
    truth: Truth
    logits: dict[str, Any]
    """What the logits are like."""


@lru_cache(maxsize=1)
def load(case: Case, hidden_file: Path | None, device: str) -> Loaded:
    """Load a case, and keep it until the next one is asked for."""
    problem = case.problem(hidden_file, device)
    return Loaded(problem, truth(problem), {"logits": problem.source, **describe(problem)})


class HeadRun:
    """Calls an implementation on fresh gradients; `logps`, `hidden.grad` and `weight.grad` hold the last results."""

    def __init__(self, way: Implementation, case: Case, phase: str, problem: Replay, ref_logps: Tensor | None) -> None:
        self.way, self.phase, self.problem, self.ref_logps = way, phase, problem, ref_logps
        self.budget = way.budget_in(case.dtype)
        train = phase != FORWARD
        self.hidden = problem.hidden.detach().clone().requires_grad_(train)
        self.weight = problem.weight.detach().requires_grad_(train and case.trainable)
        self.upstream = upstream(problem)
        self.logps: Tensor | None = None

    def __call__(self) -> None:
        """Do what is timed."""
        self.hidden.grad = self.weight.grad = self.logps = None
        if self.phase == LOSS:
            assert self.ref_logps is not None
            self.way.loss(self.problem, self.hidden, self.weight, self.ref_logps).backward()
            return
        assert self.way.logps is not None
        with torch.set_grad_enabled(self.phase != FORWARD):
            logps = self.way.logps(self.problem, self.hidden, self.weight)
        if self.phase != FORWARD:
            logps.backward(self.upstream.to(logps.dtype))
        self.logps = logps.detach()

    def errors(self, true: Truth) -> dict[str, float]:
        """Measure the errors of the last call."""
        errors: dict[str, float] = {}
        if self.logps is not None:
            errors |= logp_errors(self.logps, self.problem, true)
        if self.phase != FORWARD:
            assert self.hidden.grad is not None
            scale = BETA / 2 / (len(self.upstream) // 2) if self.phase == LOSS else 1.0
            errors |= gradient_errors(self.hidden.grad, self.weight.grad, scale, true)
        return errors

    @property
    def gradient_mib(self) -> float:
        """What the gradients take, which any implementation hands out."""
        return sum(leaf.nbytes for leaf in (self.hidden, self.weight) if leaf.requires_grad) / 2**20


def prepare(name: str, case: Case, phase: str, loaded: Loaded) -> HeadRun:
    """Put an implementation on a case; the reference of a loss has the true log-probs, as before the first step."""
    torch.compiler.reset()  # beyond eight shapes of a function, torch.compile would leave it uncompiled
    return HeadRun(IMPLEMENTATIONS[name], case, phase, loaded.problem, loaded.truth.logps.float())


def check(run: HeadRun, true: Truth) -> tuple[dict[str, float], list[str]]:
    """Call once; errors, and which of them are over the implementation's budget."""
    run()
    errors = run.errors(true)
    return errors, over_budget(errors, run.budget)


def extra_mib(run: HeadRun, name: str, case: Case, hidden_file: Path | None) -> float:
    """Measure the peak of memory beyond inputs and gradients: CUDA's allocator's, or that of a process of its own."""
    if run.hidden.is_cuda:
        run.hidden.grad = run.weight.grad = run.logps = None
        return cuda_growth_mib(run)[1] - run.gradient_mib
    return isolated(_resident_mib, name, case, run.phase, hidden_file, run.ref_logps)


def _resident_mib(name: str, case: Case, phase: str, hidden_file: Path | None, ref_logps: Tensor) -> float:
    problem = case.problem(hidden_file, "cpu")
    few = problem.cu_seqlens[:3]
    rows = int(few[-1])
    small = problem._replace(hidden=problem.hidden[:rows], target=problem.target[:rows], cu_seqlens=few)
    HeadRun(IMPLEMENTATIONS[name], case, phase, small, ref_logps[:2])()  # imports and compiles
    run = HeadRun(IMPLEMENTATIONS[name], case, phase, problem, ref_logps)
    return peak_growth_mib(run)[1] - run.gradient_mib


class NoTimeError(Exception):
    """Why an implementation is not timed."""


def checked(row: dict[str, Any], name: str, case: Case, phase: str, hidden_file: Path | None, device: str) -> HeadRun:
    """Check what is to be timed; the row gets errors, memory, and what the filter keeps.

    Raises:
        NoTimeError: it is not here, fails, or is less accurate than its budget allows.
    """
    if why := IMPLEMENTATIONS[name].absent():
        raise NoTimeError(why)
    loaded = load(case, hidden_file, device)
    try:
        run = prepare(name, case, phase, loaded)
        errors, over = check(run, loaded.truth)
        row |= errors
        if over:
            raise NoTimeError("inaccurate: " + ", ".join(over))
        row["extra_mib"] = extra_mib(run, name, case, hidden_file)
    except NoTimeError:
        raise
    except Exception as error:  # out of memory, a compiler that fails: the others still count
        raise NoTimeError(f"{type(error).__name__}: {str(error)[:300]}") from error
    if name.startswith("fused filtered") and phase == TRAIN:
        row |= filter_stats(loaded.problem, "library" if name.endswith("library") else None)
    return run


def bare_matmuls(case: Case, phase: str, problem: Replay) -> Callable[[], None]:
    """Make a function of as many products of the case's shapes as the phase needs, of the problem's numbers."""

    def run() -> None:
        with torch.no_grad():
            dz = problem.hidden @ problem.weight.T
            if phase != FORWARD:
                torch.mm(dz, problem.weight)
                if case.trainable:
                    torch.mm(dz.T, problem.hidden)

    return run


def bare_seconds(case: Case, phase: str, problem: Replay) -> float:
    """Time of the bare products now, the best of a few: the speed of this moment's machine."""
    run = bare_matmuls(case, phase, problem)

    def finished() -> None:
        run()
        if problem.hidden.is_cuda:
            torch.cuda.synchronize()

    return min(timed(finished)[1] for _ in range(3 if problem.hidden.is_cuda else 2))


def rates(case: Case, phase: str, seconds: float, bare: float) -> dict[str, float]:
    """Divide the arithmetic that the phase cannot do without, and the bare products' time, by the time."""
    flop = case.passes(phase) * 2 * case.N * case.D * case.V
    return {"tflop_per_s": flop / seconds / 1e12, "share_of_bare": bare / seconds}


def describe_row(name: str, case: Case, phase: str, loaded: Loaded) -> dict[str, Any]:
    """Describe what is known before anything runs."""
    return {
        **case.describe(),
        "phase": phase,
        "implementation": name,
        "tokens": case.N,
        "sequences": len(loaded.problem.cu_seqlens) - 1,
        **loaded.logits,
    }


def filter_stats(problem: Replay, impl: str | None = None) -> dict[str, float]:
    """Measure what the filtered forward keeps of the vocabulary, and the probability outside, means over the tokens."""
    settings: Any = {"with_stats": ("tail", "kept_fraction"), "grad_mode": "filtered", "shift": False}
    settings["options"] = KernelOptions(impl=impl)
    with torch.no_grad():
        scored = fused_token_logps(
            problem.hidden, problem.weight, problem.target, cu_seqlens=problem.cu_seqlens, **settings
        )
    assert scored.tail is not None
    assert scored.kept_fraction is not None
    return {"tail": float(scored.tail.mean()), "kept_fraction": float(scored.kept_fraction.mean())}
