"""kill -9 at random moments of a run, inside of what it writes too; then it goes on as if nothing had been.

FUSED_DPO_KILLS=500 tries more moments than `make test` does.
"""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fused_dpo_engine.checkpoint.folder import Checkpoints
from fused_dpo_engine.distributed.ranks import Ranks
from tests.engine.support.kills import Ended
from tests.engine.support.runs import assert_same_run
from tests.engine.support.toys import options
from tests.fresh_process import run_module

KILLS = int(os.environ.get("FUSED_DPO_KILLS", "20"))
SETTINGS = {
    **{"max_steps": 6, "pairs_per_step": 4, "checkpoint_every": 2, "save_steps": 3, "eval_fraction": 0.25},
    **{"eval_steps": 1, "report_to": "tensorboard"},
}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a killed process is made by fork")


@pytest.fixture
def start(tmp_path: Path, toy_settings: dict[str, Any]) -> Callable[..., list[list[Ended]]]:
    """Start `fused-dpo train --resume auto` in the folders named, once for each kill and once more to its end."""

    def start(kills: dict[str, list[dict[str, float]]], **settings: Any) -> list[list[Ended]]:
        given = options(**{**toy_settings, **SETTINGS, **settings})
        cases = [
            {"options": given, "output": str(tmp_path / name), "kills": moments} for name, moments in kills.items()
        ]
        plan = tmp_path / "plan.json"
        plan.write_text(json.dumps({"cases": cases}), encoding="utf-8")
        finished = run_module("tests.engine.support.kills", plan)
        assert finished.returncode == 0, finished.stderr
        return [[Ended(*end) for end in case] for case in json.loads(plan.with_suffix(".out").read_text())]

    return start


def test_killed_at_random_moments(start, tmp_path):
    ((whole,),) = start({"whole": []})
    assert whole.status == 0
    assert whole.operations > 100, "kills fall into what is written"
    draw = random.Random(1)

    def moment() -> dict[str, float]:
        if draw.random() < 0.3:
            return {"seconds": draw.uniform(0.2, 1.0) * whole.seconds}
        return {"operation": draw.randint(1, whole.operations)}

    # Some are killed a second time, on the way on from the first.
    kills = {f"run {number}": [moment() for _ in range(1 + number % 2)] for number in range(KILLS * 2 // 3)}
    ends = start(kills)
    by_operation = [case[0].status for name, case in zip(kills, ends, strict=True) if "operation" in kills[name][0]]
    assert set(by_operation) == {-9}
    assert {end.status for case in ends for end in case[:-1]} <= {-9, 0}, "killed, or done before its moment"
    resumed = sum("going on after step" in (tmp_path / f"{name}.log").read_text() for name in kills)
    assert resumed > 0.3 * len(kills)
    for name, case in zip(kills, ends, strict=True):
        assert case[-1].status == 0, (tmp_path / f"{name}.log").read_text()
        assert_same_run(tmp_path / name, tmp_path / "whole")
        assert_nothing_is_left(tmp_path / name)


def assert_nothing_is_left(output: Path) -> None:
    """Find nothing half written, and the newest checkpoint whole."""
    assert {path.name for path in output.rglob("*") if path.name.endswith((".new", ".old"))} == set()
    checkpoint, damaged = Checkpoints(output, 1, Ranks()).newest()
    assert checkpoint is not None
    assert not damaged


def test_control_a_lost_step_is_seen(start, tmp_path):
    """The comparison above is one of different runs too."""
    start({"whole": []})
    start({"other": []}, seed=1)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "other", tmp_path / "whole")
