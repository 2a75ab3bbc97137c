"""`make versions` tests the lower bounds of pyproject.toml, and not what they once were."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")

ROOT = Path(__file__).parent.parent
TESTED = ("train", "demo")
"""Extras whose lower bounds are tested, beside the requirements of the function alone. The others need a GPU or are
other people's kernels and tools."""


def lower_bounds() -> list[str]:
    """Requirements in pyproject.toml, without those on this project itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for extra in TESTED for one in extras[extra])]
    return [one for one in wanted if Requirement(one).name != project["name"]]


def pins() -> list[str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints-oldest.txt").read_text().splitlines())
    return [line for line in lines if line]


def version_of(requirement: str, operator: str) -> tuple[str, tuple[Version, str]]:
    """Name, and the version after the operator with the platform that it is for."""
    parsed = Requirement(requirement)
    (version,) = (Version(one.version) for one in parsed.specifier if one.operator == operator)
    return parsed.name, (version, str(parsed.marker or ""))


def assert_pinned(requirements: Iterable[str], pinned: Iterable[str]) -> None:
    assert dict(version_of(one, ">=") for one in requirements) == dict(version_of(one, "==") for one in pinned)


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    assert len(lower_bounds()) == len({Requirement(one).name for one in lower_bounds()}) > 10
    assert_pinned(lower_bounds(), pins())


@pytest.mark.parametrize("number", range(len(pins())))
def test_control_a_pin_that_drifts_is_called_out(number: int) -> None:
    """Raised, or left out."""
    first, pin, rest = pins()[:number], pins()[number], pins()[number + 1 :]
    name, (version, _) = version_of(pin, "==")
    raised = pin.replace(f"{name}=={version}", f"{name}=={version}.1")
    assert raised != pin
    for drifted in ([raised], []):
        with pytest.raises(AssertionError):
            assert_pinned(lower_bounds(), [*first, *drifted, *rest])
