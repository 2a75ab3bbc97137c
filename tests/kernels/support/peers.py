"""Functions of other people's trainers, cut out of their source where that is at hand.

The packages cannot be installed beside each other. `FUSED_DPO_PEERS=/folder` names one in which their wheels are
unzipped; a package that is installed is found without. Only the functions are run, not what they are imported with.
"""

import ast
import importlib.util
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


def source_of(path: str, folder: str = "") -> Path:
    """Find a file of a package, such as `swift/rlhf_trainers/rlhf_mixin.py`; skip the test if there is none.

    `folder` is what the name of the wheel's folder begins with, where several versions lie there.
    """
    peers = os.environ.get("FUSED_DPO_PEERS")
    if peers:
        found = sorted(Path(peers).glob(f"{folder}*/**/{path}"))
        if found:
            return found[0]
    package, _, rest = path.partition("/")
    spec = importlib.util.find_spec(package) if not folder else None
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / rest).is_file():
            return Path(location) / rest
    pytest.skip(f"{folder or package} is not at hand: FUSED_DPO_PEERS=/folder/with/unzipped/wheels")


def cut(path: Path, names: Sequence[str], known: dict[str, Any]) -> dict[str, Any]:
    """Define functions of a file, methods too, beside what they know; decorators are left out."""
    text = path.read_text(encoding="utf-8")
    found = {node.name: node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    for name in names:
        lines = text.splitlines()[found[name].lineno - 1 : found[name].end_lineno]
        exec("from __future__ import annotations\n" + textwrap.dedent("\n".join(lines)), known)
    return known
