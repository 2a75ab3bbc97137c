"""What became worse from one results file to another.

    python -m benchmarks.compare A.json B.json [--threshold 0.05]

Rows are matched by id. Time, memory and errors that are more than the threshold larger in B are regressions, and so are
rows that fail in B alone: exit status 1. Rows that B lacks are listed, and count for nothing: B may be a smaller run.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from benchmarks.arguments import positive
from benchmarks.measure import console
from benchmarks.reporting.quantities import significant
from benchmarks.reporting.records import Record, read
from benchmarks.reporting.selection import Row, failure

MEASURED = {
    "median_s": "time (s)",
    "seconds": "time (s)",
    "extra_mib": "extra memory (MiB)",
    "worst_logp_error_nat": "log-prob error, worst (nat)",
    "token_logp_rms_nat": "log-prob error, rms (nat)",
    "worst_logp_difference": "log-prob difference (nat)",
    "dhidden_error": "dH error, relative",
    "dweight_error": "dW error, relative",
}
"""What is compared, under its name in a row; less is better."""


class Change(NamedTuple):
    """A row's number that differs by more than the threshold, as printed."""

    row: str
    quantity: str
    before: str
    after: str
    change: str
    worse: bool


def changes(a: Record, b: Record, threshold: float) -> Iterator[Change]:
    """Find what changed in the rows that both files have, in the order of `a`."""
    for name, row in a.rows.items():
        if name in b.rows:
            yield from row_changes(name, row, b.rows[name], threshold)


def row_changes(name: str, a: Row, b: Row, threshold: float) -> Iterator[Change]:
    """Find what changed in one row: whether it fails, else its numbers."""
    reasons = failure(a), failure(b)
    if any(reasons):
        if not all(reasons):
            before, after = (reason or "passed" for reason in reasons)
            yield Change(name, "fails" if reasons[1] else "passes", before, after, "", bool(reasons[1]))
        return
    for key, quantity in MEASURED.items():
        before, after = a.get(key), b.get(key)
        if not (isinstance(before, int | float) and isinstance(after, int | float)) or math.isnan(before):
            continue
        worse = not after <= before * (1 + threshold)  # true for NaN, which is no number to be content with
        if worse or after < before * (1 - threshold):
            change = f"{after / before - 1:+.1%}" if before and math.isfinite(after) else ""
            if key == "median_s" and within_spread(a, b):
                change += " within spread"
            yield Change(name, quantity, shown(before), shown(after), change, worse)


def within_spread(a: Row, b: Row) -> bool:
    """Tell whether the intervals from the 20th to the 80th percentile of the times overlap."""
    if not all(key in row for row in (a, b) for key in ("p20_s", "p80_s")):
        return False
    return a["p20_s"] <= b["p80_s"] and b["p20_s"] <= a["p80_s"]


def shown(value: float) -> str:
    """Show a number in a cell."""
    return significant(value) if math.isfinite(value) else str(value)


def table(title: str, found: Sequence[Change]) -> Table:
    """Show the changes, a line each."""
    drawn = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    drawn.add_column("row", no_wrap=True)
    drawn.add_column("")
    for column in ("A", "B", "change"):
        drawn.add_column(column, justify="right")
    for change in found:
        drawn.add_row(*map(escape, change[:-1]))
    return drawn


def different(a: Record, b: Record) -> dict[str, tuple[object, object]]:
    """Say what differs between the environments, but for the commit, which is what one compares."""
    keys = [key for key in a.environment | b.environment if key != "commit"]
    pairs = {key: (a.environment.get(key), b.environment.get(key)) for key in keys}
    return {key: (before, after) for key, (before, after) in pairs.items() if before != after}


def report(a: Record, b: Record, threshold: float) -> int:
    """Print the comparison; the exit status."""
    screen = console()
    for key, (before, after) in different(a, b).items():
        screen.print(f"[yellow]warning:[/] {key} differs: {escape(str(before))} in A, {escape(str(after))} in B")
    found = list(changes(a, b, threshold))
    worse, better = ([change for change in found if change.worse is bad] for bad in (True, False))
    missing = [name for name in a.rows if name not in b.rows]
    both = len(a.rows) - len(missing)
    if worse:
        screen.print(table(f"Regressions over {100 * threshold:.3g} %, {both} rows compared", worse))
    else:
        screen.print(f"no regressions over {100 * threshold:.3g} % in {both} rows")
    if better:
        screen.print(table("Improvements", better))
    if missing:
        screen.print(f"{len(missing)} rows missing in B: {escape(', '.join(missing))}")
    return 1 if worse else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A.json", help="results before")
    parser.add_argument("b", type=Path, metavar="B.json", help="results after")
    parser.add_argument("--threshold", type=positive, default=0.05, help="relative change that counts (default: 0.05)")
    options = parser.parse_args(arguments)
    try:
        a, b = read(options.a), read(options.b)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not a.rows.keys() & b.rows.keys():
        parser.error(f"{options.a} and {options.b} have no row in common")
    return report(a, b, options.threshold)


if __name__ == "__main__":
    sys.exit(main())
