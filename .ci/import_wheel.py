"""Import every module of a wheel from an empty folder: `python .ci/import_wheel.py FILE.whl`.

The environment has the project's requirements and an editable install of it, which must not stand in for what the wheel
lacks: a package that comes from anywhere but the wheel is an error, and so is a module that cannot be imported.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = ("fused_dpo", "fused_dpo_engine")
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


def main(wheel: str) -> int:
    """Unpack the wheel, and import it in a process that sees neither this folder nor PYTHONPATH (`-I`)."""
    with tempfile.TemporaryDirectory() as unpacked, tempfile.TemporaryDirectory() as empty:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        command = [sys.executable, "-I", "-c", IMPORT_ALL, str(Path(unpacked).resolve()), *PACKAGES]
        return subprocess.run(command, cwd=empty, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
