"""What a GPU has to show before anything on it is timed: accuracy, determinism, invariance, memory, no stray reads.

Needs torch, triton and `fused_dpo` alone, but for the attention backends, which need the trainer's requirements.
Every check raises AssertionError with the numbers it found, or returns the numbers that belong into the record.
`Scale` makes them small enough for Triton's interpreter, where the tests run them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from benchmarks.gpu.problems import (
    IMPLS,
    WAYS,
    Case,
    NotHereError,
    Scale,
    cases_of,
    eager_logps,
    evaluate,
    make_case,
    with_adapter,
)
from benchmarks.heads.replay import describe, replay
from benchmarks.heads.truth import EXACT, FILTERED
from fused_dpo import KernelOptions, LMHead, fused_dpo_logps
from fused_dpo.gpu.configs import library_config
from fused_dpo.linalg.matmul import matmul_fp32


def check_something_is_dropped(case: Case) -> None:
    """Fail if the filter keeps everything, as it would then pass every other check."""
    for impl in IMPLS:
        kept = case.kept_fraction(impl)
        assert kept < 0.5, f"{impl}: {kept:.0%} of the vocabulary kept"


def check_accuracy(scale: Scale) -> dict[str, Any]:
    """Hold errors against float64 to twice those of same-dtype eager code (and the rounding of the result's dtype).

    In bf16, where eager code is far off, gradients keep the budget of the benchmarks.
    """
    record = {}
    for dtype in scale.dtypes:
        for extras in (False, True):
            case = make_case(scale, dtype, extras=extras)
            truth, eager = evaluate(case.to(torch.float64), eager_logps), evaluate(case, eager_logps)
            for way in (name for name in WAYS if "exact" in name):
                ours = evaluate(case, WAYS[way])
                for name, a, b, t in zip(("logps", "dhidden", "dweight"), ours, eager, truth, strict=True):
                    norm = float(t.norm())
                    error, eager_error = float((a.double() - t).norm()) / norm, float((b.double() - t).norm()) / norm
                    unit = torch.finfo(a.dtype).eps
                    label = f"{way}, {name}, {dtype}, {'bias and softcap' if extras else 'plain'}"
                    record[label] = {"error": error, "eager_error": eager_error}
                    bound = EXACT.gradient if a.dtype == torch.bfloat16 else 2 * eager_error + unit
                    assert error <= bound, f"{label}: error {error:.3g}, bound {bound:.3g}, eager {eager_error:.3g}"
    return record


def check_filtered(scale: Scale) -> dict[str, Any]:
    """Hold the filter, on realistic logits, to dropping something, and log-probs to half of eager code's error.

    Gradients in bf16 keep the budget of the benchmarks, in other dtypes the theorem's bound.
    """
    dtype = scale.dtypes[0]
    N = sum(scale.lengths)
    problem = replay(N, scale.filter_dim, scale.filter_vocab, device=scale.device, hidden_file=scale.hidden_file)
    rng = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *scale.lengths]).cumsum(0).to(scale.device, torch.int32)
    upstream = torch.randn(len(scale.lengths), generator=rng).to(scale.device)
    head = LMHead(problem.weight.to(dtype))
    case = Case(problem.hidden.to(dtype), head, problem.target, offsets, upstream)
    check_something_is_dropped(case)
    truth = evaluate(case.to(torch.float64), eager_logps)
    eager = evaluate(case, eager_logps)
    of_gradients = FILTERED.gradient if dtype == torch.bfloat16 else (2 * 2**-12) ** 0.5
    record: dict[str, Any] = {"source": problem.source, **describe(problem)}
    for impl in IMPLS:
        ours = evaluate(case, WAYS[f"{impl}, filtered"])
        for name, a, b, t in zip(("logps", "dhidden", "dweight"), ours, eager, truth, strict=True):
            error, eager_error = (float((x.double() - t).norm() / t.norm()) for x in (a, b))
            bound = eager_error / 2 if name == "logps" else of_gradients
            record[f"{impl}, {name}"] = {"error": error, "eager_error": eager_error}
            assert error <= bound, f"{impl}, {name}: error {error:.3g}, bound {bound:.3g}"
    return record


def check_run_to_run(scale: Scale) -> None:
    """Compare the bits of log-probs and gradients in two runs, the second with uninitialised memory full of NaN."""
    for dtype in scale.dtypes:
        check_something_is_dropped(make_case(scale, dtype, peaked=True))
        for label, function, case in cases_of(scale, dtype):
            first, second = evaluate(case, function), evaluate(case, function)
            assert all(map(torch.equal, first, second)), f"{label}: the second run differs"
            poisoned, clean = (evaluate_deterministic(case, function, poisoned=poisoned) for poisoned in (True, False))
            assert all(map(torch.equal, poisoned, clean)), f"{label}: reads uninitialised memory"


def evaluate_deterministic(
    case: Case, function: Callable[[Case], Tensor], *, poisoned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate in torch's deterministic mode, in which alone it can fill uninitialised memory with NaN."""
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = poisoned
    try:
        return evaluate(case, function)
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]


def check_batch_invariance(scale: Scale) -> None:
    """Compare the bits of a sequence's log-prob in a batch with those alone, without gradient and with an adapter."""
    if scale.device == "cpu":
        raise NotHereError("the interpreter's NumPy loops round by an element's place in the array")
    for dtype in scale.dtypes:
        check_places_in_a_product(scale, dtype)
    for dtype, adapter in product(scale.dtypes, (False, True)):
        for label, function, plain in cases_of(scale, dtype):
            case, label = (with_adapter(plain), f"{label}, adapter") if adapter else (plain, label)
            together = function(case).detach()
            assert torch.equal(evaluate(case, function)[0], together), f"{label}: differs with gradient"
            for index, (start, stop) in enumerate(pairwise(case.cu_seqlens.tolist())):
                offsets = torch.tensor([0, stop - start], dtype=torch.int32, device=scale.device)
                alone = case._replace(
                    hidden=case.hidden[start:stop], labels=case.labels[start:stop], cu_seqlens=offsets
                )
                assert torch.equal(function(alone)[0], together[index]), f"{label}: sequence {index} differs alone"


def check_places_in_a_product(scale: Scale, dtype: torch.dtype) -> None:
    """Compare the bits of equal rows wherever they stand in the products that `impl="library"` reads."""
    case, shape = make_case(scale, dtype), library_config(90, dtype)
    hidden = case.hidden[:1].expand(shape.chunk_rows, -1).contiguous()
    for columns in case.head.weight.split(shape.slice_columns):
        values = matmul_fp32(hidden, columns.T)
        assert torch.equal(values, values[:1].expand_as(values)), f"{dtype}: a row's product depends on its place"


def check_autocast(scale: Scale) -> None:
    """Compare a fp32 weight under autocast with one in bf16: the same bits in log-probs, and a gradient in fp32."""
    if scale.device == "cpu":
        raise NotHereError("Triton's interpreter does not multiply bf16")
    for label, function, case in cases_of(scale, torch.bfloat16):
        wide = case._replace(head=replace(case.head, weight=case.head.weight.float()))
        expected = evaluate(case, function)
        with torch.autocast(torch.device(scale.device).type, torch.bfloat16):
            got = evaluate(wide, function)
        assert torch.equal(got[0], expected[0]), f"{label}: the log-probs differ"
        assert got[2].dtype == torch.float32, f"{label}: the weight's gradient is in {got[2].dtype}"
        for name, a, b in zip(("dhidden", "dweight"), got[1:], expected[1:], strict=True):
            error = float((a.double() - b.double()).norm() / b.double().norm())
            assert error <= 2**-8, f"{label}, {name}: {error:.3g} from the gradient in bf16"


def check_large_offsets(scale: Scale) -> None:
    """Score labels in the last rows of a weight with V x D beyond 2^31, against a few rows of logits in full."""
    V, D, T = scale.large_vocab, scale.large_dim, 40
    dtype = scale.dtypes[0]
    rng = torch.Generator(device=scale.device).manual_seed(0)
    hidden = torch.randn(T, D, generator=rng, device=scale.device).to(dtype)
    weight = (torch.randn(V, D, generator=rng, device=scale.device, dtype=torch.float32) * 3 / D**0.5).to(dtype)
    labels = V - 1 - torch.arange(T, device=scale.device)
    offsets = torch.tensor([0, T], dtype=torch.int32, device=scale.device)
    hidden.requires_grad_()
    weight.requires_grad_()
    reference = torch.zeros((), dtype=torch.float64, device=scale.device)
    with torch.no_grad():
        for row in range(T):
            logits = torch.cat([part.double() @ hidden[row].double() for part in weight.split(2**15)])
            reference += logits[labels[row]] - logits.logsumexp(0)
    for impl in IMPLS:
        weight.grad = None
        options = KernelOptions(impl=impl)
        logps = fused_dpo_logps(hidden, weight, labels, cu_seqlens=offsets, shift=False, options=options)
        logps.sum().backward()
        error = float((logps.detach().double() - reference).abs())
        assert error < 0.01, f"{impl}: log-prob off by {error:.3g} nat"
        assert weight.grad is not None
        assert bool(weight.grad[-T:].abs().amax(1).gt(0).all()), f"{impl}: the weight's last rows got no gradient"


def check_memory(scale: Scale) -> dict[str, Any]:
    """Hold the peak beyond inputs and gradients to what the docstrings of the Triton backwards state."""
    if scale.device == "cpu":
        raise NotHereError("measured by CUDA's allocator")
    T, D, V = 8192, 2048, 128256
    problem = replay(T, D, V, device="cuda", hidden_file=scale.hidden_file)
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    offsets = torch.arange(0, T + 1, 512, device="cuda", dtype=torch.int32)
    record = {}
    # The fp32 gradient of the hidden states, and a few numbers a row and split.
    exact = KernelOptions.workspace_mib * 2**20 + 4 * T * D + 1000 * T
    filtered = exact + 7 * V * T // 128 + V * T // 64  # screen, kept columns and their lists; marks
    products = {"triton": 0, "library": 4 * 1024 * 8192}
    ways = [(impl, mode, stated + products[impl], False)
            for impl, (mode, stated) in product(IMPLS, (("exact", exact), ("filtered", filtered)))]  # fmt: skip
    ways.append(("triton", "exact", exact + 4 * D * (V // 256 + 16), True))  # a number a kept row and tile
    for impl, mode, stated, keep in ways:
        options = KernelOptions(impl=impl, reuse_exponentials=keep)
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arguments: Any = {"cu_seqlens": offsets, "shift": False, "grad_mode": mode, "options": options}
        arguments["row_index"] = torch.arange(T, device="cuda")
        logps = fused_dpo_logps(hidden, weight, problem.target, **arguments)
        forward = torch.cuda.max_memory_allocated() - before
        logps.sum().backward()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - 2 * (T * D + V * D)
        numbers = {"forward_mib": forward, "extra_mib": extra, "stated_mib": stated}
        label = f"{impl}, {mode}" + ", kept" * keep
        record[label] = {name: size / 2**20 for name, size in numbers.items()}
        assert extra <= stated, f"{label}: {extra / 2**20:.0f} MiB, stated {stated / 2**20:.0f} MiB"
    return record


def check_no_synchronisation(scale: Scale) -> None:
    """Run forward and backward with the scored rows given, where to wait for the device is an error."""
    if scale.device == "cpu":
        raise NotHereError("nothing to synchronise with")
    for (_, function, case), shift in product(cases_of(scale, torch.bfloat16), (False, True)):
        leaves = case.leaves()
        aligned = case.labels
        if shift:  # row i predicts label i + 1, the last row of a sequence nothing
            aligned = aligned.roll(-1).index_fill(0, case.cu_seqlens[1:].long() - 1, -100)
        rows = (aligned >= 0).nonzero().squeeze(1)
        function(leaves, shift=shift, row_index=rows).sum().backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            function(leaves, shift=shift, row_index=rows).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def check_streaming_agrees(scale: Scale) -> None:
    """Compare the torch implementation on this device with the kernels; filtered within both bounds."""
    for dtype, extras in product(scale.dtypes, (False, True)):
        for label, function, case in cases_of(scale, dtype, extras=extras):
            mode = "filtered" if "filtered" in label else "exact"
            torch_only = evaluate(case, partial(Case.logps, impl="streaming", grad_mode=mode))
            kernels = evaluate(case, function)
            of_gradients = 2 * (2 * 2**-12) ** 0.5 if mode == "filtered" else max(torch.finfo(dtype).eps, 1e-5)
            for name, a, b in zip(("logps", "dhidden", "dweight"), kernels, torch_only, strict=True):
                difference = float((a.double() - b.double()).norm() / b.double().norm())
                bound = 1e-5 if name == "logps" else of_gradients
                assert difference <= bound, f"{label}, {name}, {extras=}: {difference:.3g}"


def check_split_head(scale: Scale) -> None:
    """Compare the bits of a head that is split over a group of one rank with those of a whole head.

    That is all that one GPU can show: the kernels that merge in two steps, and the collectives between them.
    """
    if dist.is_initialized():
        raise NotHereError("there is a process group of somebody else's")
    store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo" if scale.device == "cpu" else "nccl", store=store, rank=0, world_size=1)
    try:
        for dtype, extras in product(scale.dtypes, (False, True)):
            for label, function, case in cases_of(scale, dtype, extras=extras):
                split = case._replace(head=replace(case.head, process_group=dist.group.WORLD))
                for name, a, b in zip(
                    ("logps", "dhidden", "dweight"), evaluate(split, function), evaluate(case, function), strict=True
                ):
                    assert torch.equal(a, b), f"{label}, {name}, {extras=}: a head in a group of one rank differs"
    finally:
        dist.destroy_process_group()


def check_attention_backends(scale: Scale) -> dict[str, str]:
    """Verify every attention backend that is installed: values, gradients, grouped heads, with and without a window."""
    if scale.device == "cpu":
        raise NotHereError("the kernels need a CUDA device")
    try:
        from fused_dpo_engine.attention.choice import ORDER, AttentionNeeds, available_backends, load_backend, why_not
        from fused_dpo_engine.attention.verify import verify_backend
        from fused_dpo_engine.errors import UserError
    except ImportError as missing:
        raise NotHereError(f"the trainer's requirements are not installed: {missing}") from None
    device, dtype = torch.device("cuda"), torch.bfloat16
    record, wrong = {}, []
    for name, window, softcap in product(ORDER, (None, 40), (None, 30.0)):
        needs = AttentionNeeds(12, 4, 64, 64, window=window, softcap=softcap)
        label = f"{name}, window {window}, softcap {softcap}"
        if name not in available_backends():
            record[name] = "not installed"
            continue
        reason = why_not(name, needs, device, dtype, torch.cuda.get_device_capability())
        if reason:
            record[label] = reason
            continue
        try:
            verify_backend(name, load_backend(name), needs, device, dtype)
            record[label] = "agrees"
        except UserError as error:  # the others are looked at all the same
            wrong.append(f"{label}: {error}")
    assert not wrong, "; ".join(wrong)
    return record


CHECKS: dict[str, Callable[[Scale], Any]] = {
    "accuracy against float64": check_accuracy,
    "run to run, NaN-poisoned": check_run_to_run,
    "filtered gradients": check_filtered,
    "batch invariance": check_batch_invariance,
    "autocast": check_autocast,
    "memory": check_memory,
    "no synchronisation": check_no_synchronisation,
    "streaming agrees": check_streaming_agrees,
    "a head split over ranks": check_split_head,
    "offsets beyond 2^31": check_large_offsets,
    "attention backends": check_attention_backends,
}
LATE = ("streaming agrees", "a head split over ranks", "offsets beyond 2^31", "attention backends")
"""What the figures of the head do not depend on: checked after them."""
OF_DTYPES = ("accuracy against float64", "run to run, NaN-poisoned", "batch invariance")
"""What is checked dtype by dtype: those that nothing is timed in after the figures, too."""
