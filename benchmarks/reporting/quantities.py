"""Which number of a row is shown under which header, in which unit, and how it is printed."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from benchmarks.reporting.selection import Row, number


class Quantity(NamedTuple):
    """A column of a table, or an axis of a plot."""

    header: str
    key: str
    best: Callable[[list[float]], float] | None = min
    """Which of several values is the best."""
    factor: float = 1.0
    """From the unit of the results file to that of the header."""

    def of(self, row: Row) -> float | None:
        """Give the value of a row in the header's unit, if it has one."""
        value = number(row, self.key)
        return None if value is None else value * self.factor

    def among(self, rows: Iterable[Row]) -> list[float]:
        """List the values of those rows that have one."""
        return [value for row in rows if (value := self.of(row)) is not None]


MEMORY = Quantity("extra memory (MiB)", "extra_mib")
SHARE = Quantity("speed vs bare matmuls (%)", "share_of_bare", max, 100)
SPEED = Quantity("tokens/s", "tokens_per_s", max)
LOGP_ERROR = Quantity("worst log-prob error (nat)", "worst_logp_error_nat")
GRADIENT_ERRORS = (
    Quantity("dH error (%)", "dhidden_error", min, 100),
    Quantity("dW error (%)", "dweight_error", min, 100),
)
KEPT = Quantity("vocabulary kept (%)", "kept_fraction", None, 100)
SLOTS = Quantity("token slots", "slots")
DIFFERENCE = Quantity("worst log-prob difference (nat)", "worst_logp_difference", None)
STAGE_SHARE = Quantity("share (%)", "share", None, 100)

SCREENS = (
    Quantity("logit error, rms (nat)", "logit_error_rms_nat"),
    LOGP_ERROR,
    KEPT,
    Quantity("entries above 2^-12 missed (%)", "missed_fraction", min, 100),
    Quantity("largest missed over 2^-12", "largest_missed_over_eps"),
)
HEAD = (SHARE, MEMORY, SPEED, LOGP_ERROR, *GRADIENT_ERRORS, KEPT)
HEAD_SHORT = (MEMORY, LOGP_ERROR, *GRADIENT_ERRORS)
STEP = (MEMORY, SPEED, SLOTS, DIFFERENCE)
STEP_SHORT = (MEMORY, SPEED)
"""Columns of the tables, beside the time."""


def time_of(rows: Iterable[Row], key: str = "median_s") -> Quantity:
    """Choose seconds, or milliseconds where the shortest time would begin with zeros."""
    seconds = Quantity("time (s)", key)
    return Quantity("time (ms)", key, min, 1000) if min(seconds.among(rows), default=1.0) < 0.1 else seconds


def significant(value: float) -> str:
    """Format three significant digits: 2,310, 0.950, 9.33e-5."""
    rounded = float(f"{value:.2e}")
    if rounded == 0:
        return "0"
    exponent = math.floor(math.log10(abs(rounded)))
    if exponent < -4:
        mantissa, _, power = f"{rounded:.2e}".partition("e")
        return f"{mantissa}e{int(power)}"
    return f"{rounded:,.{max(0, 2 - exponent)}f}"
