"""Two thousand steps hold what two hundred hold: memory, open files, threads."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.support.long_run import growth
from tests.engine.support.toys import options, read_metrics, write_rows
from tests.fresh_process import ROOT, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

BOUND = 0.01
"""Growth of memory that is no file's, some 300 MB: 0.3 % was measured, and 2.5 % where 4 KB a step stay."""


def long_run(folder: Path, model: Path, steps: int, leak: str = "") -> dict[str, float]:
    """Train so many steps in a process of its own; by how much it grows."""
    rows = [{"prompt": f"{i}?", "chosen": "yes"[: 1 + i % 3], "rejected": "no"[: 1 + i % 2]} for i in range(40)]
    settings: dict[str, Any] = {
        **{"model": model, "data": write_rows(folder / "data.jsonl", rows), "output": folder / "run"},
        **{"max_steps": steps, "pairs_per_step": 2, "tokens_per_batch": 64, "max_length": 32, "learning_rate": 1e-4},
        **{"eval_fraction": 0.1, "eval_steps": 100, "report_to": "tensorboard", "dtype": "float32", "device": "cpu"},
    }
    file = folder / "seen.json"
    run(
        "from pathlib import Path\nfrom tests.engine.support.long_run import leaking, record\n"
        f"record({['train', *options(**settings)]!r}, Path({str(file)!r}){leak})",
        cwd=ROOT,
    )
    metrics = read_metrics(folder / "run")
    assert len(metrics) == steps
    assert sum("eval_loss" in line for line in metrics) == steps // 100
    assert list((folder / "run" / "tensorboard").iterdir())
    return growth(json.loads(file.read_text(encoding="utf-8")))


def test_two_thousand_steps(tmp_path, tiny_llama):
    grown = long_run(tmp_path, tiny_llama, 2000)
    assert grown["memory"] < BOUND
    assert max(grown["files"], grown["threads"]) <= 0


def test_control_what_stays_is_seen(tmp_path, tiny_llama):
    grown = long_run(tmp_path, tiny_llama, 500, ", leaking(500)")
    assert grown["memory"] > BOUND
    assert grown["files"] > 0
    assert grown["threads"] > 0
