"""The GPU suite's checks, small, where there is no GPU."""

import json
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.support.gpu import DEVICE

MODES = ("exact", "filtered")


def put(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    """Replace a constant where it stands and where it is imported."""
    from benchmarks.gpu import checks, problems

    for module in (checks, problems):
        monkeypatch.setattr(module, name, value, raising=False)


def test_checks_that_only_a_gpu_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the GPU suite's, on code that passes them without a GPU, and on code that does not."""
    from benchmarks.gpu import checks, problems

    scale = replace(problems.SMALL, device="cpu:0", dtypes=(torch.float32,))
    put(monkeypatch, "WAYS", {"torch": partial(problems.Case.logps, impl="streaming")})
    checks.check_batch_invariance(scale)
    checks.check_autocast(scale)
    monkeypatch.setitem(problems.WAYS, "batch", lambda case: case.logps("streaming") + 1e-3 * len(case.hidden))
    with pytest.raises(AssertionError, match="sequence 0 differs alone"):
        checks.check_batch_invariance(scale)
    widened = {"widened": lambda case: case.logps("streaming") + 1e-3 * case.head.weight.dtype.itemsize}
    put(monkeypatch, "WAYS", widened)
    with pytest.raises(AssertionError, match=r"widened, .*: the log-probs differ"):
        checks.check_autocast(scale)


def test_a_split_head_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is added up twice."""
    from benchmarks.gpu import checks, problems
    from fused_dpo.linalg import gradient_sums

    scale = replace(problems.SMALL, dtypes=(torch.float32,), device="cpu")
    put(monkeypatch, "WAYS", {"torch": partial(problems.Case.logps, impl="streaming")})
    checks.check_split_head(scale)
    monkeypatch.setattr(
        gradient_sums, "sum_over_ranks", lambda values, shard: values if shard is None else values.mul_(2)
    )
    with pytest.raises(AssertionError, match=r"torch, .*dhidden, .*: a head in a group of one rank differs"):
        checks.check_split_head(scale)


def test_checks_notice_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that change from run to run, a filter that keeps everything, gradients a percent off."""
    from benchmarks.gpu import checks, problems

    scale = replace(problems.SMALL, dtypes=(torch.bfloat16,), device="cpu")
    streaming = {f"torch, {mode}": partial(problems.Case.logps, impl="streaming", grad_mode=mode) for mode in MODES}
    put(monkeypatch, "IMPLS", ("streaming",))
    put(monkeypatch, "WAYS", streaming)
    checks.check_run_to_run(scale)
    calls = count()
    monkeypatch.setitem(problems.WAYS, "filtered", lambda case: case.logps("streaming") * (1 + next(calls) * 1e-3))
    with pytest.raises(AssertionError, match=r"filtered, .*: the second run differs"):
        checks.check_run_to_run(scale)
    monkeypatch.setattr(problems, "SLOPE", 0.0)
    problems.make_case.cache_clear()
    with pytest.raises(AssertionError, match="100% of the vocabulary kept"):
        checks.check_run_to_run(scale)

    problems.make_case.cache_clear()

    put(monkeypatch, "WAYS", {"streaming, exact": streaming["torch, exact"]})
    checks.check_accuracy(scale)
    off = {"streaming, exact": lambda case: 1.01 * case.logps("streaming") - 0.01 * case.logps("streaming").detach()}
    put(monkeypatch, "WAYS", off)
    with pytest.raises(AssertionError, match=r"dhidden, torch\.bfloat16, plain: error 0\.01"):
        checks.check_accuracy(scale)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the whole suite: python -m benchmarks.gpu_suite")
def test_gpu_suite_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of the GPU suite, small; one that fails is recorded and does not stop the next."""
    from benchmarks import gpu_suite
    from benchmarks.gpu.checks import CHECKS
    from benchmarks.gpu.problems import SMALL

    record = gpu_suite.run(tmp_path, minutes=5, scale=SMALL)
    only_on_a_gpu = {"batch invariance", "autocast", "memory", "no synchronisation", "attention backends"}
    assert {name: entry["status"] for name, entry in record["parts"].items()} == {
        f"check: {name}": "skipped" if name in only_on_a_gpu else "ok" for name in CHECKS
    }
    assert json.loads((tmp_path / "gpu_suite.json").read_text()) == record

    monkeypatch.setattr(
        gpu_suite, "CHECKS", {"accuracy against float64": lambda scale: 1 / 0, "memory": CHECKS["memory"]}
    )
    record = gpu_suite.run(tmp_path, minutes=5, scale=SMALL)
    assert [entry["status"] for entry in record["parts"].values()] == ["failed", "skipped"]
    assert "ZeroDivisionError" in record["parts"]["check: accuracy against float64"]["error"]
    assert gpu_suite.run(tmp_path, minutes=-1, scale=SMALL)["parts"]["check: memory"]["status"] == "no time left"
