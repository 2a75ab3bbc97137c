"""The GPU suite's checks, small, where there is no GPU."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.kernels.triton_helpers import DEVICE


def test_checks_that_only_a_gpu_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the GPU suite's, on code that passes them without a GPU, and on code that does not."""
    from benchmarks import gpu_checks

    scale = replace(gpu_checks.SMALL, device="cpu:0", dtypes=(torch.float32,))
    monkeypatch.setattr(gpu_checks, "WAYS", {"torch": partial(gpu_checks.Case.logps, impl="streaming")})
    gpu_checks.check_batch_invariance(scale)
    gpu_checks.check_autocast(scale)
    monkeypatch.setitem(gpu_checks.WAYS, "batch", lambda case: case.logps("streaming") + 1e-3 * len(case.hidden))
    with pytest.raises(AssertionError, match="sequence 0 differs alone"):
        gpu_checks.check_batch_invariance(scale)
    widened = {"widened": lambda case: case.logps("streaming") + 1e-3 * case.head.weight.dtype.itemsize}
    monkeypatch.setattr(gpu_checks, "WAYS", widened)
    with pytest.raises(AssertionError, match="widened: the log-probs differ"):
        gpu_checks.check_autocast(scale)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the whole suite: python -m benchmarks.gpu_suite")
def test_gpu_suite_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of the GPU suite, small; one that fails is recorded and does not stop the next."""
    from benchmarks import gpu_suite
    from benchmarks.gpu_checks import CHECKS, SMALL

    record = gpu_suite.run(tmp_path, minutes=5, scale=SMALL)
    only_on_a_gpu = {"batch invariance", "autocast", "memory", "no synchronisation", "attention backends"}
    assert {name: entry["status"] for name, entry in record["parts"].items()} == {
        f"check: {name}": "skipped" if name in only_on_a_gpu else "ok" for name in CHECKS
    }
    assert json.loads((tmp_path / "gpu_suite.json").read_text()) == record

    monkeypatch.setitem(CHECKS, "accuracy against float64", lambda scale: 1 / 0)
    record = gpu_suite.run(tmp_path, minutes=5, scale=SMALL)
    statuses = [entry["status"] for entry in record["parts"].values()]
    assert statuses[0] == "failed"
    assert set(statuses[1:]) == {"ok", "skipped"}
    assert "ZeroDivisionError" in record["parts"]["check: accuracy against float64"]["error"]
    assert gpu_suite.run(tmp_path, minutes=-1, scale=SMALL)["parts"]["check: memory"]["status"] == "no time left"
