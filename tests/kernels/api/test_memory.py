"""Memory: what is allocated, and the peak against the documented bound, measured with torch's profiler."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fused_dpo import KernelOptions, LMHead, fused_dpo_logps
from tests.kernels.support.allocations import MIB, allocations_of
from tests.kernels.support.problems import cu_seqlens

pytestmark = pytest.mark.cpu_units


class Case(NamedTuple):
    """A call whose terms of the memory bound are all different."""

    T: int
    D: int
    V: int
    workspace_mib: int
    dtype: torch.dtype = torch.float32
    rank: int = 0
    weight_dtype: torch.dtype | None = None
    """Under autocast to `dtype`, where not None."""

    def call(self, needs: tuple[str, ...], impl: str = "streaming") -> Callable[[], tuple[Tensor, ...]]:
        def leaf(name: str, *shape: int) -> Tensor:
            dtype = self.weight_dtype if self.weight_dtype and name == "weight" else self.dtype
            return torch.randn(shape, dtype=dtype).requires_grad_(name in needs)

        tensors = {"hidden": leaf("hidden", self.T, self.D), "weight": leaf("weight", self.V, self.D)}
        if self.rank:
            tensors |= {"lora_a": leaf("lora_a", self.rank, self.D), "lora_b": leaf("lora_b", self.V, self.rank)}
        head = LMHead(tensors["weight"], lora=(tensors["lora_a"], tensors["lora_b"], 1.0) if self.rank else None)
        labels, offsets = torch.randint(0, self.V, (self.T,)), cu_seqlens([self.T])
        options = KernelOptions(impl=impl, workspace_mib=self.workspace_mib)

        def run() -> tuple[Tensor, ...]:
            with torch.autocast("cpu", self.dtype) if self.weight_dtype else nullcontext():
                logps = fused_dpo_logps(tensors["hidden"], head, labels, cu_seqlens=offsets, options=options)
            return torch.autograd.grad(logps.sum(), [tensors[n] for n in needs]) if needs else (logps,)

        return run

    def logits(self) -> float:
        return self.T * self.V * 4 / MIB


HIDDEN_AND_WEIGHT = ("hidden", "weight")
MANY_TOKENS = Case(T=600, D=64, V=20000, workspace_mib=4)


@pytest.mark.parametrize("needs", [(), HIDDEN_AND_WEIGHT], ids=["forward", "backward"])
def test_no_logits(needs: tuple[str, ...]) -> None:
    """Nothing of the size of the logits, nor a tenth of it, in any of the allocations but the weight's gradient."""
    found = allocations_of(MANY_TOKENS.call(needs))
    dweight = MANY_TOKENS.V * MANY_TOKENS.D * 4 / MIB
    others = [size for size in found.sizes if size != dweight]
    assert max(others) < MANY_TOKENS.logits() / 10
    assert len(found.sizes) - len(others) == bool(needs)  # the gradient itself, once
    assert found.peak < 0.3 * MANY_TOKENS.logits()


def test_control_the_reference_allocates_logits() -> None:
    """Negative control: the measurement sees a full matrix of logits where there is one."""
    found = allocations_of(MANY_TOKENS.call(HIDDEN_AND_WEIGHT, impl="reference"))
    assert found.largest >= 0.99 * MANY_TOKENS.logits()  # the last row predicts nothing
    assert found.peak > 2 * MANY_TOKENS.logits()


@pytest.mark.parametrize(
    ("needs", "absent"),
    [
        (("hidden",), "weight"),
        (("lora_a", "lora_b"), "weight"),
        (("lora_a",), "weight"),
        (("weight",), "hidden"),
    ],
    ids=["frozen head", "adapter only", "half an adapter", "frozen hidden"],
)
def test_gradients_not_asked_for_are_not_allocated(needs: tuple[str, ...], absent: str) -> None:
    T, V = (3000, 500) if absent == "hidden" else (100, 9001)
    case = Case(T, D=100, V=V, workspace_mib=1, rank=4)
    found = allocations_of(case.call(needs))
    unwanted = (T if absent == "hidden" else V) * case.D * 4 / MIB
    assert unwanted > 1.1  # clearly more than the workspace
    assert found.largest < 0.9 * unwanted
    asked_for_all = allocations_of(case.call((*needs, absent)))
    assert asked_for_all.largest > 0.99 * unwanted  # negative control


BOUNDED = {
    "fp32": Case(64, 1024, 8000, 16),
    "fp32, many tokens": MANY_TOKENS,
    "bf16": Case(64, 1024, 8000, 16, torch.bfloat16),
    "fp16": Case(64, 1024, 8000, 16, torch.float16),
    "bf16, narrow head": Case(64, 256, 12000, 8, torch.bfloat16),
    "bf16, many tokens": Case(4000, 256, 300, 1, torch.bfloat16),
    "autocast": Case(64, 1024, 8000, 16, torch.bfloat16, weight_dtype=torch.float32),
    "lora, fp32": Case(64, 1024, 8000, 16, rank=8),
    "lora, bf16": Case(64, 1024, 8000, 16, torch.bfloat16, rank=8),
    "lora, bf16, many tokens": Case(4000, 256, 300, 1, torch.bfloat16, rank=8),
}


@pytest.mark.parametrize("needs", ["forward", "hidden", "all"])
@pytest.mark.parametrize("case", BOUNDED.values(), ids=BOUNDED.keys())
def test_peak_is_bounded(case: Case, needs: str) -> None:
    """Peak beyond results: the workspace, 4 D bytes a scored row in a backward, and a little per row.

    Per row: labels in two forms, row index, log-sum-exp, running sums and their padded copies, 160 bytes together.
    Once: a block of up to 256 rows, gathered, copied and in fp32. A tenth of the workspace is left for what a
    conversion needs for a moment.
    """
    names = ("hidden", "weight", *(("lora_a", "lora_b") if case.rank else ()))
    wanted = {"forward": (), "hidden": ("hidden",), "all": names}[needs]
    call = case.call(wanted)
    call()  # caches of the first call
    found = allocations_of(call)
    accumulator = 4 * case.T * (case.D + case.rank) / MIB if wanted else 0.0
    block = 12 * min(case.T, 256) * (case.D + case.rank) / MIB
    bound = 1.1 * case.workspace_mib + accumulator + block + 160 * case.T / MIB
    used = found.peak - found.kept
    assert used <= bound, f"{used:.2f} MiB beyond the results, bound {bound:.2f} (workspace {case.workspace_mib})"


def test_workspace_bounds_are_kept_by_narrow_slices() -> None:
    """Less workspace is less memory, down to the smallest."""
    peaks = [allocations_of(Case(600, 64, 20000, mib).call(("hidden",))).peak for mib in (1, 4, 64)]
    assert peaks[0] < peaks[1] < peaks[2]


def test_saved_for_backward_is_inputs_and_one_number_a_row() -> None:
    saved: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    case = Case(500, 64, 2000, 1)
    hidden, weight = torch.randn(case.T, case.D, requires_grad=True), torch.randn(case.V, case.D, requires_grad=True)
    labels = torch.randint(0, case.V, (case.T,))
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        fused_dpo_logps(hidden, weight, labels, cu_seqlens=cu_seqlens([case.T]))
    inputs = {t.untyped_storage().data_ptr() for t in (hidden, weight)}
    extra = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert sum(size for pointer, size in extra.items() if pointer not in inputs) <= 24 * case.T  # targets are int64
