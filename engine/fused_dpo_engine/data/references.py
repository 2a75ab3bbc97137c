"""Log-probs of a reference model that a row brings along, from whoever has computed them."""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

COLUMNS = (("ref_chosen_logps", "ref_rejected_logps"), ("reference_chosen_logps", "reference_rejected_logps"))
"""Of the chosen answer and of the rejected one: what TRL calls them, and what it once did."""
ROUNDING = 1e-3
"""By how much a log-prob may exceed 0, its largest value."""


class Brought(NamedTuple):
    """Holds the reference's log-probs that one row brings along, as far as they can be read."""

    logps: tuple[float, float] | None
    """Chosen, rejected; None unless both are there and are log-probs."""
    used: frozenset[str]
    """Names of the columns."""


def read_brought(values: Mapping[str, Any]) -> Brought | None:
    """Read the reference's log-probs of a row; None if it has no such columns. Capital letters make no difference."""
    names = {name.lower(): name for name, value in values.items() if value is not None}
    used = frozenset(names[name] for pair in COLUMNS for name in pair if name in names)
    if not used:
        return None
    for pair in COLUMNS:
        logps = [_logp(values[names[name]]) for name in pair if name in names]
        if len(logps) == 2 and None not in logps:
            return Brought((logps[0], logps[1]), used)  # pyright: ignore[reportArgumentType]
    return Brought(None, used)


def _logp(value: Any) -> float | None:
    if isinstance(value, str):  # as in tables
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) and value <= ROUNDING else None
