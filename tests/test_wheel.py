"""A wheel holds every file of the source roots, rooms that nobody has listed included."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def check_wheel():
    """The module `.ci/check_wheel.py`, which lies outside of any package."""
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / ".ci" / "check_wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what a wheel is built from, as building leaves files beside its sources."""
    copy = tmp_path / "project"
    for folder in ("kernels", "engine"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


def differences(project: Path) -> list[str]:
    """Of the wheel built from the project, and the project."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "-c", BUILD, str(project / "dist")]
    subprocess.run(command, cwd=project, check=True, capture_output=True, text=True)
    (wheel,) = (project / "dist").glob("*.whl")
    return check_wheel().differences(wheel, project)


def test_wheel_holds_the_source_tree(project: Path):
    assert differences(project) == []


def test_a_new_room_is_in_the_wheel(project: Path):
    room = project / "kernels" / "fused_dpo" / "attic"
    room.mkdir()
    (room / "__init__.py").write_text('"""A room that setup.py does not name."""\n')
    (room / "trunk.py").write_text("")
    assert differences(project) == []


def test_control_a_folder_without_init_is_found_out(project: Path):
    room = project / "engine" / "fused_dpo_engine" / "attic"
    room.mkdir()
    (room / "trunk.py").write_text("")
    assert differences(project) == ["not in the wheel: fused_dpo_engine/attic/trunk.py"]
