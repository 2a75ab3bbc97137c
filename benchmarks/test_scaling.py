"""Time and memory of forward and backward against N, D and V, and where the time of the main case goes."""

from typing import Any

import pytest

from benchmarks.conftest import DEVICE, DTYPE, MeasureHead
from benchmarks.heads import run as head
from benchmarks.heads.cases import AXES, SCALED, STAGED, TRAIN, Case, head_cases, scaling_cases
from benchmarks.heads.peers import IMPLEMENTATIONS
from benchmarks.heads.stages import stages_of

GPU = DEVICE == "cuda"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test a case along an axis and implementation."""
    if "axis" in metafunc.fixturenames:
        few = pytest.mark.skipif(not (GPU or metafunc.config.getoption("--full")), reason="on a CPU with --full only")
        arguments = [
            pytest.param(axis, case, name, id=f"{axis}={getattr(case, axis)}/{name}", marks=few)
            for axis in AXES
            for case in scaling_cases(axis, GPU, DTYPE)
            for name in SCALED
        ]
        metafunc.parametrize(("axis", "case", "name"), arguments)


def test_scaling(measure_head: MeasureHead, axis: str, case: Case, name: str) -> None:
    """One point of a curve."""
    row = {"id": f"scaling/{axis}/{getattr(case, axis)}/{name}", "suite": "scaling", "axis": axis}
    measure_head(row, case, TRAIN, name)


@pytest.mark.parametrize("name", STAGED)
def test_stages(request: pytest.FixtureRequest, record_rows: list[dict[str, Any]], name: str) -> None:
    """Seconds of each stage of the main case."""
    if why := IMPLEMENTATIONS[name].absent():
        pytest.skip(why)
    case, phase = head_cases(GPU, DTYPE)[0]
    loaded = head.load(case, request.config.getoption("--hidden"), DEVICE)
    rows = stages_of(case.name, name, head.prepare(name, case, phase, loaded))
    assert sum(row["seconds"] for row in rows) > 0
    record_rows += rows
