"""What importing costs and what may import what."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fresh_process import ROOT, hide, run

PACKAGES = {"fused_dpo": ROOT / "kernels" / "fused_dpo", "fused_dpo_engine": ROOT / "engine" / "fused_dpo_engine"}
IMPLEMENTATIONS = {"reference", "streaming", "filtered"}
ABOVE_IMPLEMENTATIONS = {"autograd", "api"}


def test_import_needs_nothing_but_torch(tmp_path: Path) -> None:
    """With everything optional out of reach, a call with gradients works."""
    output = run(
        hide("transformers", "peft", "triton", "fused_dpo_engine") + "import torch, fused_dpo\n"
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
    code = "import fused_dpo as f; print([n for n in f.__all__ if not hasattr(f, n)], sorted(f.__all__) == f.__all__)"
    assert run(code, tmp_path).strip() == "[] True"


def imports_of(source: str, package: str) -> Iterator[tuple[str, bool]]:
    """Absolute dotted names that the source imports, and whether at module level."""
    tree = ast.parse(source)
    nested = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            yield name, id(node) not in nested


def violations(module: str, source: str, package: str) -> list[str]:
    """Imports of one module that break a rule of the house, as `module imports name: rule`."""
    found = []
    is_triton = module.startswith("triton_")
    for name, top_level in imports_of(source, package):
        top, _, rest = name.partition(".")
        sibling = rest.split(".")[0] if top == "fused_dpo" else ""
        implementation = sibling in IMPLEMENTATIONS or sibling.startswith("triton_")
        rules = {
            "triton is imported in triton_* only": top == "triton" and not is_triton,
            "triton_* is imported lazily": sibling.startswith("triton_") and top_level and not is_triton,
            "tests and benchmarks are above the packages": top in ("tests", "benchmarks", "examples"),
        }
        if package == "fused_dpo":
            allowed = {"torch", "triton", "fused_dpo", *sys.stdlib_module_names}
            same_family = is_triton and sibling.startswith("triton_")
            lower = not (module in ABOVE_IMPLEMENTATIONS or module == "__init__")
            rules |= {
                "fused_dpo needs torch, triton and the standard library alone": top not in allowed,
                "implementations never import each other, and nothing below autograd imports one": (
                    lower and implementation and not same_family
                ),
                "nothing below the api imports it": lower and sibling in ABOVE_IMPLEMENTATIONS,
            }
        found += [f"{module} imports {name}: {rule}" for rule, broken in rules.items() if broken]
    return found


def sources() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            yield package, path


@pytest.mark.parametrize(("package", "path"), list(sources()), ids=[f"{p}/{f.stem}" for p, f in sources()])
def test_import_direction(package: str, path: Path) -> None:
    assert violations(path.stem, path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize(
    ("module", "source", "package"),
    [
        ("losses", "import numpy", "fused_dpo"),
        ("losses", "from fused_dpo_engine import config", "fused_dpo"),
        ("losses", "from fused_dpo.streaming.exact import streaming_forward", "fused_dpo"),
        ("head", "def f():\n    import transformers", "fused_dpo"),
        ("options", "from fused_dpo import reference", "fused_dpo"),
        ("reference", "from fused_dpo import streaming", "fused_dpo"),
        ("reference", "from . import streaming", "fused_dpo"),
        ("streaming", "from .reference import reference_token_logps", "fused_dpo"),
        ("streaming", "import triton.language as tl", "fused_dpo"),
        ("streaming", "from fused_dpo.api import fused_dpo_logps", "fused_dpo"),
        ("triton_forward", "from fused_dpo.streaming.exact import slice_bounds", "fused_dpo"),
        ("autograd", "from fused_dpo.gpu.forward import launch_logps_forward", "fused_dpo"),
        ("trainer", "import triton", "fused_dpo_engine"),
        ("trainer", "from tests.kernels import helpers", "fused_dpo_engine"),
    ],
)
def test_control_the_rules_find_violations(module: str, source: str, package: str) -> None:
    assert violations(module, source, package)


@pytest.mark.parametrize(
    ("module", "source", "package"),
    [
        ("autograd", "def f():\n    from fused_dpo.gpu.forward import launch_logps_forward", "fused_dpo"),
        ("triton_forward", "import triton\nfrom fused_dpo.gpu.configs import config_for", "fused_dpo"),
        ("trainer", "from fused_dpo import fused_dpo_logps\nimport transformers", "fused_dpo_engine"),
    ],
)
def test_control_the_rules_allow_what_is_planned(module: str, source: str, package: str) -> None:
    assert violations(module, source, package) == []
