"""Options and fixtures of `pytest benchmarks/`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import records
from benchmarks.measure import quantiles

ROWS = pytest.StashKey[list[dict[str, Any]]]()
TimeRow = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options beside those of pytest-benchmark."""
    group = parser.getgroup("fused-dpo benchmarks")
    group.addoption("--results", type=Path, help="write the rows to this JSON file")
    group.addoption("--full", action="store_true", help="the large heads and the scaling curves too, on a CPU as well")
    group.addoption("--hidden", type=Path, help="file of real hidden states (default: the shared one, else synthetic)")
    group.addoption("--model", help="model of the whole step (default: the one `make demo` fetched)")
    group.addoption("--data", help="preference pairs of the whole step (default: examples/preferences.jsonl)")


def pytest_configure(config: pytest.Config) -> None:
    """Begin the record."""
    config.stash[ROWS] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the record."""
    path, rows = session.config.getoption("--results"), session.config.stash[ROWS]
    if path and rows:
        records.write(path, rows)


@pytest.fixture
def time_row(request: pytest.FixtureRequest, benchmark: Any) -> TimeRow:
    """Time a function that has passed its checks, and record its row.

    `time_row(row, function, rounds=3)` runs it once to warm up and `rounds` times for the clock; on a GPU a round
    ends when the device has finished. The row gets the times and goes into extra_info and the results file.
    """

    def time(row: dict[str, Any], function: Callable[[], Any], rounds: int = 3) -> None:
        def run() -> None:
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        benchmark.group = row["id"].rpartition("/")[0]
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
        row |= quantiles(benchmark.stats.stats.data)
        if "tokens" in row:
            row["tokens_per_s"] = row["tokens"] / row["median_s"]
        benchmark.extra_info |= row
        request.config.stash[ROWS].append(row)

    return time


@pytest.fixture
def refuse(request: pytest.FixtureRequest) -> Callable[[dict[str, Any], str], None]:
    """Record why a row gets no time, and fail the test with it."""

    def fail(row: dict[str, Any], reason: str) -> None:
        request.config.stash[ROWS].append(row | {"failed": reason})
        pytest.fail(reason, pytrace=False)

    return fail
