"""Options and fixtures of `pytest benchmarks/`."""

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch

from benchmarks.arguments import hidden_file, out_file
from benchmarks.heads import run as head
from benchmarks.heads.cases import BARE, Case
from benchmarks.heads.peers import IMPLEMENTATIONS
from benchmarks.measure import compute_dtype, quantiles
from benchmarks.reporting import records

ROWS = pytest.StashKey[list[dict[str, Any]]]()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = compute_dtype(DEVICE)
"""What the cases are in: on a CPU without bf16 units bf16 ones would tell how slow those are missed, and take hours."""
ROUNDS = 10 if DEVICE == "cuda" else 3
SECONDS = 6.0
"""Where rounds of twice the bare products' time would take longer, there are fewer of them."""

Row = dict[str, Any]
TimeRow = Callable[..., None]
Refuse = Callable[[Row, str], NoReturn]
MeasureHead = Callable[[Row, Case, str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options to those of pytest-benchmark."""
    group = parser.getgroup("fused-dpo benchmarks")
    group.addoption("--results", type=out_file, help="write the rows to this JSON file")
    group.addoption("--full", action="store_true", help="scaling curves and a larger step on a CPU too: half an hour")
    group.addoption(
        "--hidden", type=hidden_file, help="file of real hidden states (default: the shared one, else synthetic)"
    )
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
def record_rows(request: pytest.FixtureRequest) -> list[Row]:
    """Give the rows of the results file."""
    return request.config.stash[ROWS]


@pytest.fixture
def time_row(record_rows: list[Row], benchmark: Any) -> TimeRow:
    """Time a function that has passed its checks, and record its row.

    `time_row(row, function, rounds=3, warmup=1)` runs it `warmup` times and then `rounds` times for the clock; on a
    GPU a round ends when the device has finished. The row gets the times, and is the test's extra_info and goes into
    the results file, with whatever is added to it later.
    """

    def time(row: Row, function: Callable[[], Any], rounds: int = 3, warmup: int = 1) -> None:
        def run() -> None:
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        benchmark.group = row["id"].rpartition("/")[0]
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=warmup)
        row |= quantiles(benchmark.stats.stats.data)
        if "tokens" in row:
            row["tokens_per_s"] = row["tokens"] / row["median_s"]
        benchmark.extra_info = row
        record_rows.append(row)

    return time


@pytest.fixture
def refuse(record_rows: list[Row]) -> Refuse:
    """Record why a row gets no time, and fail the test with it."""

    def fail(row: Row, reason: str) -> NoReturn:
        record_rows.append(row | {"failed": reason})
        pytest.fail(reason, pytrace=False)

    return fail


@pytest.fixture
def measure_head(
    request: pytest.FixtureRequest, record_rows: list[Row], time_row: TimeRow, refuse: Refuse
) -> MeasureHead:
    """Make `measure_head(row, case, phase, name)`, which checks an implementation, then measures memory and time."""
    hidden_file = request.config.getoption("--hidden")

    def measure(row: Row, case: Case, phase: str, name: str) -> None:
        if name != BARE and (why := IMPLEMENTATIONS[name].absent()):
            pytest.skip(why)
        loaded = head.load(case, hidden_file, DEVICE)
        row |= head.describe_row(name, case, phase, loaded)
        if name != BARE and (why := IMPLEMENTATIONS[name].untimed(case.dtype)):
            record_rows.append(row | {"failed": why})
            pytest.skip(why)
        if name == BARE:
            time_row(row, head.bare_matmuls(case, phase, loaded.problem), rounds=ROUNDS)
            row |= head.rates(case, phase, row["median_s"], row["median_s"])
            return
        try:
            run = head.checked(row, name, case, phase, hidden_file, DEVICE)
        except head.NoTimeError as reason:
            refuse(row, str(reason))
        # A machine's speed drifts in the minutes between rows: the ratio is taken side by side.
        bare = head.bare_seconds(case, phase, loaded.problem)
        rounds = max(1, min(ROUNDS, int(SECONDS / (2 * bare))))
        time_row(row, run, rounds=rounds, warmup=0)  # the check was the first call
        row |= head.rates(case, phase, row["median_s"], bare)

    return measure
