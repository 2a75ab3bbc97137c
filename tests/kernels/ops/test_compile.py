"""`torch.compile` without graph breaks or recompiles, and the ops' own contracts with `torch.library`."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fused_dpo import LMHead, fused_dpo_logps, fused_token_logps
from tests.kernels.support.problems import DIFFERENTIABLE, IGNORE, bits_equal, cu_seqlens

pytestmark = pytest.mark.cpu_units

V, D = 50, 16


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packed(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(sum(lengths), D, requires_grad=True)
    labels = torch.randint(0, V, (sum(lengths),))
    return hidden, labels.masked_fill(torch.rand(labels.shape) < 0.3, IGNORE), cu_seqlens(lengths)


def padded(B: int, S: int) -> tuple[Tensor, Tensor, None]:
    return torch.randn(B, S, D, requires_grad=True), torch.randint(0, V, (B, S)), None


BATCHES = {
    "packed": [packed, [[5, 7], [3, 0, 11], [1, 2, 3, 4, 100], [70, 300]]],
    "padded": [padded, [(2, 5), (3, 9), (4, 100), (7, 64)]],
}


@pytest.mark.parametrize("grad_mode", ["exact", "filtered"])
@pytest.mark.parametrize("form", BATCHES)
def test_no_break_and_no_recompile(form: str, grad_mode: str) -> None:
    """Every batch has another number of tokens and sequences: compiled once, with the bits of the eager call."""
    make, sizes = BATCHES[form]
    weight, bias = torch.randn(V, D, requires_grad=True), torch.randn(V, requires_grad=True)
    lora = torch.randn(4, D, requires_grad=True), torch.randn(V, 4, requires_grad=True)

    def step(hidden: Tensor, labels: Tensor, offsets: Tensor | None) -> Tensor:
        head = LMHead(weight, bias, logit_scale=0.5, softcap=5.0, temperature=0.7, lora=(*lora, 2.0))
        return fused_dpo_logps(hidden, head, labels, cu_seqlens=offsets, average=True, grad_mode=grad_mode)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for size in sizes:
        batch = make(*size) if form == "padded" else make(size)
        inputs = batch[0], weight, bias, *lora
        expected, got = step(*batch), compiled(*batch)
        assert bits_equal(got.detach(), expected.detach())
        upstream = torch.linspace(-1, 2, len(expected))
        grads = torch.autograd.grad(got, inputs, upstream)
        assert all(
            bits_equal(a, b) for a, b in zip(grads, torch.autograd.grad(expected, inputs, upstream), strict=True)
        )
        counts.append(counter.frame_count)
    assert counts == counts[:1] * len(sizes)  # torch 2.11 calls the backend twice for the first batch


def test_sizes_become_dynamic_by_themselves() -> None:
    """Without `dynamic=True` the second size compiles once more, and later sizes never again."""
    weight = torch.randn(V, D)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda h, y, o: fused_dpo_logps(h, weight, y, cu_seqlens=o), fullgraph=True, backend=counter
    )
    counts = []
    for lengths in ([5, 7], [3, 9, 11], [4, 4, 4, 4], [50, 60]):
        compiled(*packed(lengths))
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2]


def test_token_logps_and_statistics_compile() -> None:
    weight = torch.randn(V, D)

    def step(hidden: Tensor, labels: Tensor, offsets: Tensor) -> tuple:
        names = ("entropy", "is_top1", "log_sum_sq_probs")
        return fused_token_logps(hidden, weight, labels, cu_seqlens=offsets, with_stats=names)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    batch = packed([5, 70])
    for got, expected in zip(compiled(*batch), step(*batch), strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected)


@pytest.mark.parametrize("bad", [V, V + 1000, -1])
def test_label_out_of_range_is_nan_where_values_cannot_be_seen(bad: int) -> None:
    """Compiled code does not look at values; then an invalid label gives NaN, never a number that looks right."""
    weight = torch.randn(V, D)
    hidden, labels, offsets = packed([5, 6])
    labels[2] = bad
    compiled = torch.compile(
        lambda h, y, o: fused_dpo_logps(h, weight, y, cu_seqlens=o), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    logps = compiled(hidden, labels, offsets)
    assert logps.isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match="labels must lie in"):
        fused_dpo_logps(hidden, weight, labels, cu_seqlens=offsets)


def test_compile_under_autocast() -> None:
    weight = torch.randn(V, D, requires_grad=True)
    hidden, labels, offsets = packed([5, 70])

    def step(h: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return fused_dpo_logps(h, weight, labels, cu_seqlens=offsets)

    expected, got = step(hidden), torch.compile(step, fullgraph=True, backend="aot_eager")(hidden)
    assert torch.equal(got, expected)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (got, expected)), strict=True):
        assert bits_equal(a, b)


def arguments(dtype: torch.dtype, lora: bool, requires_grad: bool = True) -> tuple[Tensor | None, ...]:
    """hidden, weight, bias, lora a, lora b, target, offsets, with ignored rows and a transposed weight."""
    floats = [torch.randn(9, D), torch.randn(D, V).T, torch.randn(V)]
    floats += [torch.randn(3, D), torch.randn(V, 3)] if lora else []
    tensors: list[Tensor | None] = [t.to(dtype).requires_grad_(requires_grad) for t in floats]
    target = torch.randint(0, V, (9,)).index_fill(0, torch.tensor([0, 4]), -1)
    return (*tensors, *([] if lora else [None, None]), target, torch.tensor([0, 5, 9]))


SETTINGS = (1.5, 0.7, 9.0, 0.8, "streaming", 64)  # lora scale, logit scale, softcap, temperature, impl, workspace
WHOLE = (0, 0, 0, "")  # where the head lies in a vocabulary that is split
OPS = torch.ops.fused_dpo


def check(op: Callable, *args: object) -> None:
    results = torch.library.opcheck(op, args)  # pyright: ignore[reportArgumentType]
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("eps", [0.0, 2**-12], ids=["exact", "filtered"])
@pytest.mark.parametrize("row_index", [None, torch.tensor([1, 2, 8])], ids=["search", "given"])
@pytest.mark.parametrize("want_stats", [False, True], ids=["plain", "stats"])
@pytest.mark.parametrize("lora", [False, True], ids=["weight", "lora"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_token_logps(
    dtype: torch.dtype, lora: bool, want_stats: bool, row_index: Tensor | None, eps: float
) -> None:
    settings = *SETTINGS, eps, 0.5, want_stats, False, False, *WHOLE
    check(OPS.token_logps.default, *arguments(dtype, lora), row_index, *settings)


@pytest.mark.parametrize(
    "needs",
    ["hidden weight bias lora_a lora_b", "hidden", "weight bias", "lora_a lora_b"],
)
@pytest.mark.parametrize("eps", [0.0, 2**-12], ids=["exact", "filtered"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_token_logps_backward(dtype: torch.dtype, needs: str, eps: float) -> None:
    inputs = arguments(dtype, lora=True, requires_grad=False)
    call = (*inputs, None, *SETTINGS, eps, 0.5, False, False, False, *WHOLE)
    _, state, screen, *_ = OPS.token_logps.default(*call)
    dlogps = torch.randn(9, dtype=state.dtype)
    wanted = [name in needs.split() for name in DIFFERENTIABLE]
    check(OPS.token_logps_backward.default, dlogps, state, screen, wanted, *call)


@pytest.mark.parametrize("lengths", [[2, 0, 3], [5], [0, 5, 0]], ids=str)
def test_opcheck_sequence_sum(lengths: list[int]) -> None:
    check(OPS.sequence_sum.default, torch.randn(5, requires_grad=True), cu_seqlens(lengths).long())


def test_rows_beyond_the_last_offset_have_no_gradient() -> None:
    """On a GPU nobody looks at the offsets; an index out of bounds would end the process's use of it."""
    values = torch.randn(7, requires_grad=True)
    OPS.sequence_sum(values, torch.tensor([0, 2, 5])).backward(torch.tensor([2.0, 3.0]))
    assert values.grad is not None
    assert values.grad.tolist() == [2.0, 2.0, 3.0, 3.0, 3.0, 0.0, 0.0]
