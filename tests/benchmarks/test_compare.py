"""`python -m benchmarks.compare` finds what became worse, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import main

ENVIRONMENT = {"device": "CPU", "threads": 2, "torch": "2.13.0", "commit": "aaaaaaa"}


def row(name: str = "one", **fields: Any) -> dict[str, Any]:
    """A row that passed, in a spread of 1 % of its time."""
    time = fields.pop("median_s", 1.0)
    known = {"p20_s": 0.99 * time, "p80_s": 1.01 * time, "extra_mib": 100.0, "worst_logp_error_nat": 1e-3}
    return {"id": f"head/case/forward/{name}", "median_s": time, **known, **fields}


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Exit status and output for the rows of A and of B."""

    def run(a: list[dict[str, Any]], b: list[dict[str, Any]], *options: str, **changed: Any) -> tuple[int, str]:
        paths = []
        for name, rows, environment in (("a", a, ENVIRONMENT), ("b", b, ENVIRONMENT | changed)):
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps({"environment": environment, "rows": rows}))
        return main([*map(str, paths), *options]), capsys.readouterr().out

    return run


@pytest.mark.parametrize("key", ["median_s", "extra_mib", "worst_logp_error_nat"])
def test_only_what_is_over_the_threshold_is_a_regression(compare, key: str) -> None:
    before = row()
    status, output = compare([before], [row(**{key: before[key] * 1.04})])
    assert (status, "forward/one" in output) == (0, False)
    status, output = compare([before], [row(**{key: before[key] * 1.06})])
    assert status == 1
    assert "forward/one" in output
    assert "+6.0%" in output


def test_threshold(compare) -> None:
    assert compare([row()], [row(median_s=1.06)], "--threshold", "0.1")[0] == 0
    assert compare([row()], [row(median_s=1.04)], "--threshold", "0.01")[0] == 1


@pytest.mark.parametrize("threshold", ["0", "-0.1", "nan", "inf"])
def test_a_threshold_that_is_none(compare, capsys: pytest.CaptureFixture[str], threshold: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        compare([row()], [row()], f"--threshold={threshold}")
    assert exit_.value.code == 2
    assert f"argument --threshold: must be over 0 and finite, got {threshold}" in capsys.readouterr().err


def test_a_row_is_compared_with_its_own_id(compare) -> None:
    """Faster and slower rows in another order."""
    a = [row("slow", median_s=2.0), row("fast", median_s=1.0)]
    assert compare(a, a[::-1])[0] == 0
    assert compare(a, [row("slow", median_s=1.0), row("fast", median_s=2.0)])[0] == 1


def test_improvements_are_listed_and_pass(compare) -> None:
    status, output = compare([row()], [row(extra_mib=50.0)])
    assert status == 0
    assert "Improvements" in output
    assert "-50.0%" in output


@pytest.mark.parametrize(("median_s", "p20_s", "marked"), [(1.06, 1.0, True), (1.06, 1.05, False)])
def test_differences_within_the_spread_are_listed_and_marked(compare, median_s, p20_s, marked) -> None:
    status, output = compare([row()], [row(median_s=median_s, p20_s=p20_s)])
    assert status == 1
    assert ("spread" in output) is marked


def test_a_row_that_newly_fails_is_a_regression(compare) -> None:
    failing = {"id": row()["id"], "failed": "out of memory [gpu]"}
    status, output = compare([row()], [failing])
    assert status == 1
    assert "out of memory [gpu]" in output
    assert compare([failing], [row()])[0] == 0
    assert compare([failing], [failing])[0] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_a_regression(compare, value: float) -> None:
    assert compare([row()], [row(worst_logp_error_nat=value)])[0] == 1


def test_missing_rows_are_named_and_count_for_nothing(compare) -> None:
    status, output = compare([row(), row("two")], [row()])
    assert status == 0
    assert "1 rows missing in B: head/case/forward/two" in output
    assert "missing" not in compare([row()], [row(), row("two")])[1]


def test_missing_fields_are_not_compared(compare) -> None:
    assert compare([row()], [{"id": row()["id"], "median_s": 1.0}])[0] == 0


@pytest.mark.parametrize(
    ("changed", "warned"), [({"threads": 8}, True), ({"torch": "2.14.0"}, True), ({"commit": "bbbbbbb"}, False)]
)
def test_other_environments_are_warned_of(compare, changed: dict[str, Any], warned: bool) -> None:
    assert ("warning" in compare([row()], [row()], **changed)[1]) is warned


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"no json",
        b"\xff\xfe\xb0",
        b'{"rows": []}',
        b'{"environment": {}}',
        b"[]",
        b'{"environment": 3, "rows": []}',
    ],
)
def test_unreadable_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        main([str(path), str(path)])
    assert exit_.value.code == 2
    assert str(path) in capsys.readouterr().err


def test_files_without_a_common_row(compare, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        compare([row()], [row("two")])
    assert exit_.value.code == 2
    assert "no row in common" in capsys.readouterr().err
