"""Compare a wheel with the source tree, and import every module of it: `python .ci/check_wheel.py FILE.whl`.

An editable install hides what a wheel lacks, so both checks look at the wheel alone: it has to hold the very files that
lie in the source roots, and its modules have to be importable from an empty folder, none of them from anywhere else.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PROJECT = Path(__file__).parents[1]
ROOTS = ("kernels", "engine")
PACKAGES = ("fused_dpo", "fused_dpo_engine")
SUFFIXES = (".py", ".typed")
IMPORT_ALL = """
import importlib, pkgutil, sys
from pathlib import Path

wheel, *packages = sys.argv[1:]
sys.path.insert(0, wheel)
for name in packages:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
ours = {name: Path(module.__file__) for name, module in sys.modules.items() if name.split(".")[0] in packages}
for name, path in ours.items():
    if not path.is_relative_to(wheel):
        sys.exit(f"the wheel has no {name}: it was imported from {path}")
print(f"{len(ours)} modules imported from the wheel, all of {' and '.join(packages)}")
"""


def differences(wheel: Path, project: Path = PROJECT) -> list[str]:
    """List the source files that the wheel lacks, and those that it holds and the project does not."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith(SUFFIXES)}
    roots = [project / root for root in ROOTS]
    there = {path.relative_to(root).as_posix() for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES}
    return [f"not in the wheel: {name}" for name in sorted(there - packed)] + [
        f"in the wheel alone: {name}" for name in sorted(packed - there)
    ]


def main(wheel: str) -> int:
    """Compare, then import in a process that sees neither this folder nor PYTHONPATH (`-I`)."""
    if found := differences(Path(wheel)):
        print("\n".join(found), file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as unpacked, tempfile.TemporaryDirectory() as empty:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        command = [sys.executable, "-I", "-c", IMPORT_ALL, str(Path(unpacked).resolve()), *PACKAGES]
        return subprocess.run(command, cwd=empty, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
