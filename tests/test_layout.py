"""What importing costs, and which module may import which: by dotted path, as file names repeat."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fresh_process import ROOT, hide, run

PACKAGES = {"fused_dpo": ROOT / "kernels" / "fused_dpo", "fused_dpo_engine": ROOT / "engine" / "fused_dpo_engine"}
ITSELF = "__init__"
ORDER: dict[str, list[tuple[str, ...]]] = {
    "fused_dpo": [
        (ITSELF,),
        ("integrations",),
        ("models",),
        ("api",),
        ("ops",),
        ("gpu", "streaming", "oracle"),
        ("validation", "linalg", "filtering"),
        ("vocab_parallel",),
        ("head", "options", "stats", "hardware", "transforms", "version"),
    ],
    "fused_dpo.gpu": [
        ("autotune",),
        ("filtered", "library", "backward_from_exponentials"),
        ("forward", "backward"),
        ("exponentials", "merge", "adapter"),
        ("tile", "launch"),
        ("configs",),
    ],
    "fused_dpo_engine": [
        ("__main__",),
        ("cli",),
        ("commands",),
        ("reports",),
        ("training",),
        ("analysis",),
        ("reference",),
        ("model",),
        ("batching", "checkpoint"),
        ("data",),
        ("attention", "distributed", "config"),
        ("errors",),
    ],
}
"""Rooms and modules of a package, top to bottom: each imports what stands below it, nothing above or beside it."""
ALONE = ("fused_dpo.losses", "fused_dpo.full_logits")
"""Import nothing of ours; imported by `fused_dpo` itself and by what is outside of it."""
PACKING = tuple(f"fused_dpo_engine.{room}" for room in ("attention", "batching", "errors"))
"""What integrations may import of the engine: rows packed, without its data, settings and pinned requirements."""
PUBLIC = ("fused_dpo", "fused_dpo.losses", "fused_dpo.hardware")
"""What the engine may import of the kernels."""
EXPORTS = (*PUBLIC, "fused_dpo.integrations")
"""Packages that users import from."""


def test_import_needs_nothing_but_torch(tmp_path: Path) -> None:
    """With everything optional out of reach, a call with gradients works."""
    output = run(
        hide("transformers", "peft", "triton", "fused_dpo_engine", "accelerate", "trl")
        + "import torch, fused_dpo, fused_dpo.integrations, fused_dpo.integrations.trl_legacy\n"
        "h = torch.randn(1, 3, 4, requires_grad=True)\n"
        "fused_dpo.fused_dpo_logps(h, torch.randn(5, 4), torch.tensor([[1, 2, 3]])).sum().backward()\n"
        "print(h.grad.shape)",
        tmp_path,
    )
    assert output.strip() == "torch.Size([1, 3, 4])"


def test_control_what_is_hidden_cannot_be_imported(tmp_path: Path) -> None:
    """Nor a module in it, and a search for it finds nothing."""
    code = (
        "import importlib.util\n"
        "for name in ('triton', 'triton.language'):\n"
        "    try:\n        importlib.import_module(name)\n"
        "    except ModuleNotFoundError:\n        print(importlib.util.find_spec('triton'))"
    )
    assert run(hide("triton") + code, tmp_path).split() == ["None", "None"]


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    """Beyond what torch itself loads: no transformers, peft or triton, and CUDA is left alone."""
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport fused_dpo\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} & {'transformers', 'peft', 'triton', "
        "'numpy', 'datasets', 'fused_dpo_engine'}), torch.cuda.is_initialized())"
    )
    assert run(code, tmp_path).strip() == "[] False"


@pytest.mark.parametrize("root", ["kernels", "engine"])
def test_source_roots_are_not_packages(root: str, tmp_path: Path) -> None:
    """A top-level package `kernels` would shadow Hugging Face's, which transformers imports (see setup.py)."""
    assert not (ROOT / root / "__init__.py").exists()
    code = f"import importlib.util as u; spec = u.find_spec({root!r}); print(spec and spec.origin)"
    for cwd in (ROOT, tmp_path):
        origin = run(code, cwd).strip()
        assert origin == "None" or not Path(origin).is_relative_to(ROOT / root)


def test_public_names(tmp_path: Path) -> None:
    for module in ("fused_dpo", "fused_dpo.integrations"):
        code = f"import {module} as f; names = f.__all__; missing = [name for name in names if not hasattr(f, name)]; "
        code += "print(missing, names == sorted(names))"
        assert run(code, tmp_path).strip() == "[] True"


def dotted(package: str, path: Path) -> str:
    """Path of a module; of a package that of its folder."""
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


MODULES = {dotted(package, path): path for package, root in PACKAGES.items() for path in sorted(root.rglob("*.py"))}


class Import(NamedTuple):
    """One name that a module imports."""

    module: str
    """Where from."""
    name: str
    """Empty where it is the module itself."""
    lazy: bool
    """In a function, or for type checkers alone."""


def imports_of(module: str, source: str) -> Iterator[Import]:
    """Everything that the source of a module imports."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for_checkers = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    lazy = {id(node) for outer in (*functions, *for_checkers) for node in ast.walk(outer)}
    package = module if MODULES.get(module, Path("a.py")).stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, "", id(node) in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*above, node.module]))
            for alias in node.names:
                is_module = f"{base}.{alias.name}" in MODULES
                yield Import(
                    f"{base}.{alias.name}" if is_module else base, "" if is_module else alias.name, id(node) in lazy
                )


def place(module: str, package: str) -> str:
    """The room or module of a package in which a module lies; ITSELF for the package."""
    return module.removeprefix(package).strip(".").split(".")[0] or ITSELF


def lies_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def upward(module: str, imported: str) -> Iterator[str]:
    """Why an import within one of the packages goes the wrong way, if it does."""
    for package, layers in ORDER.items():
        if not (lies_in(module, package) and lies_in(imported, package)):
            continue
        if lies_in(module, *ALONE) or lies_in(imported, *ALONE):
            continue
        layer_of = {room: number for number, rooms in enumerate(layers) for room in rooms}
        here, there = place(module, package), place(imported, package)
        if package != "fused_dpo" and ITSELF in (here, there):  # an empty __init__
            continue
        if missing := [room for room in (here, there) if room not in layer_of]:
            yield f"{package}.{missing[0]} has no place in ORDER"
        elif here != there and layer_of[there] <= layer_of[here]:
            yield f"{here} stands below or beside {there}"


def violations(module: str, source: str) -> list[str]:
    """Imports of one module that break a rule of the house, as `module imports name: rule`."""
    found = []
    ours = lies_in(module, "fused_dpo")
    in_gpu = lies_in(module, "fused_dpo.gpu")
    for imported, name, lazy in imports_of(module, source):
        top = imported.split(".")[0]
        alone = [room for room in ALONE if lies_in(module, room)]
        rules = {
            "triton is imported in gpu only": top == "triton" and not in_gpu,
            "gpu is imported in functions of ops only": lies_in(imported, "fused_dpo.gpu")
            and not in_gpu
            and not (lies_in(module, "fused_dpo.ops") and lazy),
            "tests and benchmarks are above the packages": top in ("tests", "benchmarks", "examples"),
            "what begins with _ belongs to its module": name.startswith("_") and top in PACKAGES,
            "losses and full_logits stand alone": bool(alone)
            and lies_in(imported, "fused_dpo")
            and not lies_in(imported, *alone),
            "nothing below fused_dpo itself needs losses or full_logits": ours
            and module != "fused_dpo"
            and not alone
            and lies_in(imported, *ALONE),
            "fused_dpo needs torch, triton and the standard library alone": ours
            and top not in ("torch", "triton", "fused_dpo", *sys.stdlib_module_names)
            and not (lies_in(module, "fused_dpo.integrations") and lazy),
            "integrations take the engine's attention and batching alone": ours
            and top == "fused_dpo_engine"
            and not lies_in(imported, *PACKING),
            "the engine imports what is public": lies_in(module, "fused_dpo_engine")
            and top == "fused_dpo"
            and imported not in PUBLIC,
        }
        reasons = [rule for rule, broken in rules.items() if broken] + list(upward(module, imported))
        found += [f"{module} imports {'.'.join(filter(None, (imported, name)))}: {reason}" for reason in reasons]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_import_direction(module: str) -> None:
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


def circle_in(sources: dict[str, str]) -> list[str] | None:
    """Modules that import each other in a circle, lazily or not; None if there is none."""
    graph = {
        module: {one.module for one in imports_of(module, source) if one.module in sources and one.module != module}
        for module, source in sources.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_no_circle() -> None:
    sources = {module: path.read_text(encoding="utf-8") for module, path in MODULES.items()}
    assert circle_in(sources) is None
    sources["fused_dpo.stats"] += "\n\ndef late():\n    from fused_dpo.ops import dispatch\n"
    assert circle_in(sources), "control: one that is closed by a lazy import is found"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_says_what_it_is(package: str) -> None:
    """A folder has an `__init__.py` with a docstring, and code in it only where users import from it."""
    for folder in {path.parent for path in PACKAGES[package].rglob("*.py")}:
        tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), folder
        assert len(tree.body) == 1 or dotted(package, folder / "__init__.py") in EXPORTS, folder


@pytest.mark.parametrize(
    ("tests", "code"),
    [
        ("kernels", PACKAGES["fused_dpo"]),
        ("engine", PACKAGES["fused_dpo_engine"]),
        ("benchmarks", ROOT / "benchmarks"),
    ],
)
def test_tests_mirror_the_rooms(tests: str, code: Path) -> None:
    """A folder of tests is named like the room or module that it tests; what tests share is in `support`."""
    for folder in (ROOT / "tests" / tests).iterdir():
        if folder.is_dir() and folder.name not in ("support", "__pycache__"):
            assert (code / folder.name).is_dir() or (code / f"{folder.name}.py").is_file(), folder


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fused_dpo.losses.pairs", "import numpy"),
        ("fused_dpo.losses.pairs", "from fused_dpo_engine import config"),
        ("fused_dpo.losses.pairs", "from fused_dpo.stats import TokenStats"),
        ("fused_dpo.api", "from fused_dpo.losses import LOSSES"),
        ("fused_dpo.head", "def f():\n    import transformers"),
        ("fused_dpo.models.head", "import transformers"),
        ("fused_dpo.options", "from fused_dpo import oracle"),
        ("fused_dpo.options", "from fused_dpo import KernelOptions"),
        ("fused_dpo.options", "from fused_dpo.stats import TokenStats"),
        ("fused_dpo.oracle", "from fused_dpo import streaming"),
        ("fused_dpo.oracle", "from . import streaming"),
        ("fused_dpo.streaming.exact", "from ..oracle import reference_token_logps"),
        ("fused_dpo.streaming.exact", "import triton.language as tl"),
        ("fused_dpo.streaming.exact", "from fused_dpo.api import fused_dpo_logps"),
        ("fused_dpo.streaming.filtered_forward", "from fused_dpo.streaming.screener import _products"),
        ("fused_dpo.gpu.forward", "from fused_dpo.streaming.tiles import slice_width"),
        ("fused_dpo.gpu.forward", "from fused_dpo.gpu.autotune import choose_config"),
        ("fused_dpo.gpu.forward", "from fused_dpo.gpu.filtered.forward import triton_filtered_forward"),
        ("fused_dpo.gpu.tile", "from fused_dpo.gpu.launch import Tiles"),
        ("fused_dpo.ops.dispatch", "from fused_dpo.gpu.forward import triton_forward"),
        ("fused_dpo.api", "def f():\n    from fused_dpo.gpu.forward import triton_forward"),
        ("fused_dpo.api", "from fused_dpo.models.head import head_of"),
        ("fused_dpo.attic.trunk", "from fused_dpo.head import LMHead"),
        ("fused_dpo.models.head", "def f():\n    import transformers"),
        ("fused_dpo.models.head", "from fused_dpo.integrations.scoring import Scorer"),
        ("fused_dpo.integrations.scoring", "def f():\n    from fused_dpo_engine.model.build import build_policy"),
        ("fused_dpo_engine.training.trainer", "import triton"),
        ("fused_dpo_engine.training.trainer", "from tests.kernels import helpers"),
        ("fused_dpo_engine.training.trainer", "from fused_dpo.ops.sequence_sum import sequence_sum"),
        ("fused_dpo_engine.attention.plan", "from fused_dpo_engine.data.pairs import TokenPair"),
        ("fused_dpo_engine.attention.plan", "def f():\n    from fused_dpo_engine.config.options import ModelOptions"),
        ("fused_dpo_engine.batching.packing", "from fused_dpo_engine.model.policy import Policy"),
    ],
)
def test_control_the_rules_find_violations(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fused_dpo.ops.dispatch", "def f():\n    from fused_dpo.gpu.forward import triton_forward"),
        ("fused_dpo.gpu.forward", "import triton\nfrom fused_dpo.gpu.configs import tile_config"),
        ("fused_dpo.gpu.filtered.forward", "from fused_dpo.gpu.forward import fused_scan"),
        ("fused_dpo.integrations.trl", "def f():\n    import trl"),
        ("fused_dpo.integrations.scoring", "def f():\n    from fused_dpo_engine.attention.plan import Segment"),
        ("fused_dpo_engine.training.trainer", "from fused_dpo import fused_dpo_logps\nimport transformers"),
        ("fused_dpo_engine.training.trainer", "from fused_dpo_engine.model import policy"),
    ],
)
def test_control_the_rules_allow_what_is_planned(module: str, source: str) -> None:
    assert violations(module, source) == []
