"""`pytest benchmarks/`: time, memory and error of every implementation of the head on the heads of known models."""

import pytest

from benchmarks.conftest import DEVICE, DTYPE, MeasureHead
from benchmarks.heads.cases import BARE, LOSS, Case, head_cases
from benchmarks.heads.peers import IMPLEMENTATIONS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test a case, phase and implementation."""
    arguments = [
        pytest.param(case, phase, name, id=f"{case.name}/{phase}/{name}")
        for case, phase in head_cases(DEVICE == "cuda", DTYPE)
        for name in (BARE, *IMPLEMENTATIONS)
        if phase == LOSS or name == BARE or IMPLEMENTATIONS[name].logps
    ]
    metafunc.parametrize(("case", "phase", "name"), arguments)


def test_head(measure_head: MeasureHead, case: Case, phase: str, name: str) -> None:
    """Errors against float64 within the implementation's budget; only then it is timed."""
    measure_head({"id": f"head/{case.name}/{phase}/{name}", "suite": "head"}, case, phase, name)
