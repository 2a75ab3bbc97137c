"""Results on disk: the environment they belong to, and one row a measurement, each on a line of its own to link to.

A row is a flat dict. `id` names what was measured, the same in every run; `suite`, `case` and `implementation` are the
parts of it that tables and plots group by. A row with `failed` says why there is no time.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measure

FOLDER = Path(__file__).parents[1] / "results"
SUMMARISED = ("extra_mib", "share_of_bare", "worst_logp_error_nat", "dhidden_error", "dweight_error", "kept_fraction")


class Record(NamedTuple):
    """One results file."""

    path: Path
    environment: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    """The rows by their ids, in the order of the file."""
    lines: dict[str, int]
    """Line of the file, from 1, that each row is on."""


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write `rows` with this machine's environment."""
    body = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"environment": {json.dumps(measure.environment())},\n"rows": [\n{body}\n]}}\n')


def read(path: Path) -> Record:
    """Read a results file; ValueError if it is not one."""
    try:
        content = json.loads(path.read_text())
        environment, rows = content["environment"], {row["id"]: row for row in content["rows"]}
        if not isinstance(environment, dict):
            raise TypeError("its environment is no object")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a results file of these benchmarks ({type(error).__name__}: {error})"
        ) from None
    if len(rows) < len(content["rows"]):
        raise ValueError(f"{path} names a row twice")
    return Record(path, environment, rows, {name: line for line, name in enumerate(rows, start=3)})


def failed(rows: Iterable[dict[str, Any]], names: Iterable[str]) -> list[str]:
    """List the rows of some implementations, by id, that have no time though they were there to be measured."""
    wanted = set(names)
    return [row["id"] for row in rows if "failed" in row and row.get("implementation") in wanted]


def summary(row: dict[str, Any]) -> str:
    """Show a row in a line of a log."""
    if "failed" in row:
        return f"{row['id']}: {row['failed']}"
    if "seconds" in row:
        return f"{row['id']}: {1e3 * row['seconds']:.2f} ms"
    numbers = {key: row[key] for key in SUMMARISED if key in row}
    return f"{row['id']}: {1e3 * row['median_s']:.2f} ms " + " ".join(f"{k}={v:.4g}" for k, v in numbers.items())
