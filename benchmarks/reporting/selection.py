"""Which rows of results belong together, which are ours, and which cases stand for the rest: for tables and plots."""

import math
import re
from collections.abc import Iterable
from typing import Any

from benchmarks.heads.cases import TRAIN

Row = dict[str, Any]

AXES = {"N": "tokens", "V": "vocabulary", "D": "hidden size"}
"""What the scaling curves vary."""


def is_ours(name: str) -> bool:
    """Tell whether an implementation of the head, or a way of the whole step, is this package's."""
    return name.startswith("fused") or name.split(",")[0] in {"shared", "packed", "padded"}


def failure(row: Row) -> str | None:
    """Say why a row has no numbers; None if it has them."""
    return row.get("failed")


def number(row: Row, key: str) -> float | None:
    """Read the finite number under `key` of a row that passed."""
    value = row.get(key)
    if isinstance(value, int | float) and math.isfinite(value) and failure(row) is None:
        return float(value)
    return None


def of_suite(rows: Iterable[Row], suite: str) -> list[Row]:
    """Select the rows of a suite, in order; those of the scaling curves that tell what varies, and its value."""
    found = [row for row in rows if row.get("suite", row["id"].partition("/")[0]) == suite]
    return [row for row in found if row.get("axis") in row] if suite == "scaling" else found


def grouped(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    """Group rows by what they have under `key`, in order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get(key, "")), []).append(row)
    return groups


def plain_cases(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Select the forward and backward of each head case that is no variant of another (`-frozen`, `-long`, …).

    The first is the main one: the benchmark runs the most telling first.
    """
    cases = grouped([row for row in of_suite(rows, "head") if row.get("phase") == TRAIN], "case")
    return {case: of_case for case, of_case in cases.items() if re.search(r"-N\d+(-float32)?$", case)} or cases
