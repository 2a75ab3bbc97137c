"""`python -m benchmarks.tuning`: variants of the kernels, applied, checked, and given back."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tuning
from benchmarks.heads.cases import FORWARD, TRAIN, Case
from benchmarks.heads.peers import IMPLEMENTATIONS, Implementation
from benchmarks.heads.truth import EXACT
from benchmarks.report import main as report
from benchmarks.reporting import records
from benchmarks.tuning import SHIPPED, VARIANTS, Variant, applied, in_order
from fused_dpo.gpu import configs as triton_configs

SMALL = Case("tiny", 60, 16, 100)  # smaller than the shared file of hidden states, so its logits are synthetic


def found(where: Any, key: Any) -> Any:
    return where[key] if isinstance(where, dict) else getattr(where, key)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.id)
def test_a_variant_changes_what_is_there_and_gives_it_back(variant: Variant) -> None:
    before = [found(where, key) for where, key, _ in variant.changes]
    with applied(variant.changes):
        for (where, key, value), shipped in zip(variant.changes, before, strict=True):
            assert found(where, key) == value != shipped
    assert [found(where, key) for where, key, _ in variant.changes] == before
    assert bool(variant.changes) == (variant.name != SHIPPED)


def test_every_computation_has_what_is_shipped_to_compare_with() -> None:
    assert len({variant.id for variant in VARIANTS}) == len(VARIANTS)
    shipped = {(v.implementation, v.phase) for v in VARIANTS if v.name == SHIPPED}
    assert {(v.implementation, v.phase) for v in VARIANTS} == shipped
    assert {v.implementation for v in VARIANTS} <= set(IMPLEMENTATIONS)


def test_largest_predicted_gain_first() -> None:
    some = [
        Variant("fused exact", TRAIN, "a", 9.0),
        Variant("fused exact", TRAIN, SHIPPED, 10.0),
        Variant("fused exact", FORWARD, "b", 6.0),
        Variant("fused exact", FORWARD, SHIPPED, 5.0),
        Variant("fused exact", FORWARD, "c", 4.0),
    ]
    assert [v.name for v in in_order(some)] == [SHIPPED, SHIPPED, "c", "a", "b"]


def test_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The change holds while the variant runs; a variant that is wrong or fails leaves the others their times."""
    real = IMPLEMENTATIONS["fused exact"]
    assert real.logps is not None
    seen: list[int] = []

    def noted(problem: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(triton_configs.GROUP_MIB)
        if triton_configs.GROUP_MIB == 13:
            raise MemoryError("too large")
        assert real.logps is not None
        return real.logps(problem, hidden, weight) * (1 + (triton_configs.GROUP_MIB == 17))

    monkeypatch.setitem(IMPLEMENTATIONS, "noted", Implementation("noted", noted, EXACT))
    monkeypatch.setattr("benchmarks.heads.run.isolated", lambda *_: 0.0)
    some = [Variant("noted", TRAIN, SHIPPED, 2.0, "first")]
    some += [Variant("noted", TRAIN, f"groups of {size}", 1.0, "", (tuning.group_mib(size),)) for size in (5, 13, 17)]
    rows = list(tuning.tuned(some, replace(SMALL), None))
    assert [row["variant"] for row in rows] == [SHIPPED, "groups of 5", "groups of 13", "groups of 17"]
    assert set(seen) == {triton_configs.GROUP_MIB, 5, 13, 17}
    assert all(row["median_s"] > 0 and row["predicted_s"] > 0 for row in rows[:2])
    assert rows[2]["failed"] == "MemoryError: too large"
    assert rows[3]["failed"].startswith("inaccurate: token_logp_rms_nat")

    records.write(tmp_path / "results" / "tuning.json", rows)
    report([str(tmp_path / "results" / "tuning.json"), "--page", str(page(tmp_path))])
    text = (tmp_path / "results" / "README.md").read_text()
    assert "### Tuning: [noted, forward+backward]" in text
    assert "| as shipped: first |" in text
    assert "predicted (" in text
    selection = (tmp_path / "page.md").read_text().splitlines()
    assert [line[:10] for line in selection if line and "<!--" not in line] == ["All cases,"], "nothing of it there"


def test_an_older_device_takes_other_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant that would change nothing is not timed; what is the same for all devices is."""
    monkeypatch.setattr("benchmarks.tuning.head.checked", lambda *_: lambda: None)
    monkeypatch.setattr("benchmarks.tuning.seconds_of", lambda *_: [1.0])
    monkeypatch.setattr("benchmarks.tuning.median_seconds", lambda *_: 1.0)
    changes = {"tile": tuning.tile(128, 64, 64), "product": tuning.gathered(128, 32), "group": tuning.group_mib(5)}
    some = [Variant("fused exact", TRAIN, name, 1.0, "", (change,)) for name, change in changes.items()]
    loaded = tuning.head.load(SMALL, None, "cpu")
    monkeypatch.setattr("benchmarks.tuning.head.load", lambda *_: loaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, why in (((8, 6), "changes tiles for compute capability 9.0"), ((10, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        rows = {row["variant"]: row for row in tuning.tuned(some, SMALL, None)}
        for name in ("tile", "product"):
            assert ("median_s" in rows[name]) is (why is None)
            assert rows[name].get("failed", "").startswith(why or "")
        assert rows["group"]["median_s"] > 0


def page(folder: Path) -> Path:
    from benchmarks.report import BEGIN, END

    path = folder / "page.md"
    path.write_text(f"{BEGIN}\n{END}\n")
    return path


@pytest.mark.parametrize("module", ["gpu_suite", "tuning", "compile_table"])
def test_a_bare_checkout_is_enough(module: str) -> None:
    """Where only torch and triton are installed, as on a machine that is there for its GPU."""
    allowed = needed("torch", "triton") | {"fused-dpo"}
    installed = packages_distributions().items()
    others = {name for name, owners in installed if not allowed & {normalised(owner) for owner in owners}}
    assert {"rich", "transformers", "safetensors", "pytest"} <= others
    assert not {"torch", "triton", "sympy", "typing_extensions"} & others
    code = (
        "import importlib.util, sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__name__', '').lower()]\n"
        "assert importlib.util.find_spec('fused_dpo') is None\n"
        f"sys.modules.update(dict.fromkeys({others}))\n"
        f"import benchmarks.{module}\n"
        "import fused_dpo, fused_dpo_engine\n"
    )
    bare = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], env=bare)


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def needed(*distributions: str) -> set[str]:
    """These and what they require, but for extras."""
    found: set[str] = set()
    ahead = list(distributions)
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            with suppress(PackageNotFoundError):  # what other platforms require
                lines = [line for line in requires(name) or () if "extra ==" not in line]
                ahead += [normalised(re.split(r"[^\w.-]", line)[0]) for line in lines]
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "nothing"], "no variant contains 'nothing'"), (["--only", "fused exact"], "no CUDA device")],
)
def test_errors(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() and "CUDA" in message:
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit) as stopped:
        tuning.main(["--out", str(tmp_path / "rows.json"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
