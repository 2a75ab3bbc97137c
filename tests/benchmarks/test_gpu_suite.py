"""`python -m benchmarks.gpu_suite`: its parts, their record, and what is left when a process dies.

Its checks are tested in tests/benchmarks/test_gpu_checks.py.
"""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import ROOT, gpu_suite
from benchmarks.gpu import supervise
from benchmarks.heads.cases import BARE, TRAIN, Case
from benchmarks.heads.peers import IMPLEMENTATIONS, Implementation, per_sequence
from benchmarks.heads.truth import EXACT
from benchmarks.reporting import records

SMALL = Case("tiny", 150, 512, 2000)
"""Its hidden size is below that of the shared file of hidden states, so its logits are synthetic."""

SUITE = """
import os, sys, time
from pathlib import Path
from benchmarks import gpu_suite

def hangs():
    time.sleep(60)

def loses():
    gpu_suite.device_is_lost = lambda: True
    raise RuntimeError("illegal memory access")

parts = {"fine": lambda: 1, "dies": lambda: os._exit(9), "rows": lambda: iter([{"id": "a", "median_s": 1.0}])}
parts |= {"hangs": hangs, "loses": loses, "last": lambda: None}
gpu_suite.parts = lambda *_: iter(parts.items())
resume = sys.argv[-1] == "resume"
gpu_suite.run(Path(sys.argv[2]), float(sys.argv[4]), gpu_suite.Scale(), resume=resume)
"""


class TestGpuSuite:
    def test_rows_of_a_case(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that fails, one that is wrong and one that is absent leave the others their rows."""

        def fails(*_: object) -> torch.Tensor:
            raise MemoryError("too large")

        others = {
            "fails": Implementation("fails", fails, EXACT),
            "wrong": Implementation("wrong", per_sequence(lambda h, w, t: h.sum(-1) * w.sum()), EXACT),
            "absent": Implementation("absent", fails, EXACT, module="no_such_package"),
        }
        for name, way in others.items():
            monkeypatch.setitem(IMPLEMENTATIONS, name, way)
        names = (BARE, "fused filtered", *others)
        rows = {row["implementation"]: row for row in gpu_suite.head_rows(SMALL, TRAIN, None, names)}
        assert rows["fails"]["failed"] == "MemoryError: too large"
        assert rows["wrong"]["failed"].startswith("inaccurate: token_logp_rms_nat")
        assert rows["absent"]["failed"] == "no_such_package is not installed"
        assert all("median_s" not in rows[name] for name in others)
        ours = rows["fused filtered"]
        assert ours["id"] == "head/tiny-N150/forward+backward/fused filtered"
        assert {"median_s", "extra_mib", "share_of_bare", "kept_fraction", "dweight_error", "tokens_per_s"} <= set(ours)
        assert rows[BARE]["share_of_bare"] > 0
        assert "too large" in records.summary(rows["fails"])
        assert "dweight_error" in records.summary(ours)

    def test_parts_on_a_gpu(self) -> None:
        """Checks of what is timed, the main case, the variants, a whole step, then the rest; each once."""
        names = [name for name, _ in gpu_suite.parts(gpu_suite.Scale(), None)]
        first = [f"check: {name}" for name in gpu_suite.CHECKS if name not in gpu_suite.LATE]
        first += ["ceilings", "head Qwen3-8B-N8192 forward+backward", "stages", "tuning", "step random:llama-1b"]
        assert names[: len(first)] == first
        assert {f"check: {name}" for name in gpu_suite.CHECKS} <= set(names)
        assert {"scaling with N", "compute-sanitizer", "check: batch invariance, other dtypes"} <= set(names)
        assert len(set(names)) == len(names)
        assert "step my/model" in [name for name, _ in gpu_suite.parts(gpu_suite.Scale(), None, "my/model")]

    def test_what_is_timed_is_checked_first_and_other_dtypes_later(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[torch.dtype, ...]] = []
        name = "accuracy against float64"
        monkeypatch.setitem(gpu_suite.CHECKS, name, lambda scale: seen.append(scale.dtypes))
        work = dict(gpu_suite.parts(gpu_suite.Scale()))
        work[f"check: {name}"]()
        work[f"check: {name}, other dtypes"]()
        assert seen == [(torch.bfloat16,), (torch.float16, torch.float32)]

    def test_a_part_without_our_times_has_failed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def rows(*failing: str):
            return lambda: iter(
                {"id": name, "implementation": name} | ({"failed": "x"} if name in failing else {"median_s": 1.0})
                for name in ("fused exact", "TRL")
            )

        parts = [("peer", rows("TRL")), ("ours", rows("fused exact")), ("all", rows("TRL", "fused exact"))]
        monkeypatch.setattr(gpu_suite, "parts", lambda *_: iter(parts))
        record = gpu_suite.run(tmp_path, 1.0, gpu_suite.Scale())["parts"]
        assert [entry["status"] for entry in record.values()] == ["ok", "failed", "failed"]
        assert record["ours"]["error"] == "no time for fused exact"

    def test_what_is_left_runs_in_another_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """After a part that kills its process, one that hangs, and one after which the GPU is lost."""
        script = tmp_path / "suite.py"
        script.write_text(SUITE)
        out = tmp_path / "out"
        out.mkdir()
        monkeypatch.setattr(supervise, "HANGING_SECONDS", 1.0)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        supervise.supervised([sys.executable, str(script), "--out", str(out)], out, 1.0)
        record = json.loads((out / "gpu_suite.json").read_text())["parts"]
        assert {name: entry["status"] for name, entry in record.items()} == {
            "fine": "ok", "dies": "failed", "rows": "ok", "hangs": "failed", "loses": "failed", "last": "ok",
        }  # fmt: skip
        assert "ended with status -9" in record["hangs"]["error"]
        assert "ended with status 9" in record["dies"]["error"]
        assert list(records.read(out / "gpu_rows.json").rows) == ["a"]

        script.write_text("raise SystemExit(3)")
        with pytest.raises(SystemExit, match="ended with status 3 before any part"):
            supervise.supervised([sys.executable, str(script)], out, 1.0)

    def test_rows_are_kept_as_they_come_until_time_is_up(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def work():
            yield {"id": "a", "median_s": 0.5}
            time.sleep(0.3)
            yield {"id": "b", "failed": "too large"}
            raise AssertionError("after the time was up")

        parts = [("first", lambda: {"x": 1}), ("rows", work), ("last", lambda: None)]
        monkeypatch.setattr(gpu_suite, "parts", lambda *_: iter(parts))
        record = gpu_suite.run(tmp_path, 0.2 / 60, gpu_suite.Scale())
        assert [entry["status"] for entry in record["parts"].values()] == ["ok", "cut short", "no time left"]
        assert record["parts"]["rows"]["result"] == ["a: 500.00 ms ", "b: too large"]
        assert list(records.read(tmp_path / "gpu_rows.json").rows) == ["a", "b"]

    def test_the_sanitizer_keeps_to_the_time(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Begun with time enough only, stopped with all that it started, and memcheck without torch's own blocks."""
        tool, pid = tmp_path / "compute-sanitizer", tmp_path / "pid"
        tool.write_text('#!/bin/sh\necho "$2, caching ${PYTORCH_NO_CUDA_MEMORY_CACHING:-on}"\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
        record = gpu_suite.sanitizer()
        assert {mode: entry["output"] for mode, entry in record.items()} == {
            "memcheck": "memcheck, caching 1\n",
            "racecheck": "racecheck, caching on\n",
        }
        with pytest.raises(gpu_suite.NotHereError, match="5 s are left, too few for memcheck"):
            gpu_suite.sanitizer(time.perf_counter() + 5.4)

        monkeypatch.setattr(gpu_suite, "SANITIZER_SECONDS", 0.1)
        tool.write_text(f"#!/bin/sh\nsleep 60 & echo $! > {pid}\nwait\n")
        begun = time.perf_counter()
        with pytest.raises(TimeoutError, match="memcheck took longer than the 1 s that were left"):
            gpu_suite.sanitizer(begun + 1)
        assert time.perf_counter() - begun < 10
        state = Path(f"/proc/{int(pid.read_text())}/stat")
        while state.exists() and ") Z " not in state.read_text():  # a killed process is gone a moment later
            assert time.perf_counter() - begun < 10, "what the tool had started runs on"
            time.sleep(0.01)

        tool.write_text('#!/bin/sh\necho "out of bounds"\nexit 9\n')
        with pytest.raises(AssertionError, match="memcheck: exit 9: out of bounds"):
            gpu_suite.sanitizer()

    def test_the_sanitizer_is_told_when_time_is_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[float] = []
        monkeypatch.setattr(gpu_suite, "sanitizer", told.append)
        dict(gpu_suite.parts(gpu_suite.Scale(), deadline=7.0))["compute-sanitizer"]()
        assert told == [7.0]
