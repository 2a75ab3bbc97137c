"""`python -m benchmarks.report`: tables, plots and README from the results files, and the check that they agree."""

import builtins
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.report import BEGIN, END, PROJECT, main
from benchmarks.reporting import records
from benchmarks.reporting.quantities import significant
from benchmarks.reporting.selection import is_ours
from benchmarks.reporting.tables import sizes

SIZES = {"N": 2048, "D": 576, "V": 49152}
REASON = "log-probs off by 3 nat | twice\nthe budget"


def head_row(implementation: str, median_s: float | None, suite: str = "head", **fields: Any) -> dict[str, Any]:
    """A row of the head; without a time it failed."""
    known = {"suite": suite, "case": "Small-N2048", "phase": "forward+backward", "implementation": implementation}
    name = f"{suite}/{fields.get('case', 'Small-N2048')}/{fields.get('axis', '')}{fields.get('N', '')}/{implementation}"
    measured = {"failed": REASON} if median_s is None else {"median_s": median_s, "extra_mib": 100 * median_s}
    return {"id": name, **known, **SIZES, "logits": "real-logit replay", **measured, **fields}


def sample() -> list[dict[str, Any]]:
    """A few rows of every suite."""
    step = {"suite": "step", "case": "model", "pairs": 16}
    stage = {"suite": "stages", "case": "Small-N2048", "implementation": "fused exact"}
    return [
        head_row("bare matmuls", 0.5, extra_mib=None),
        head_row("naive bf16", 2.0051, worst_logp_error_nat=0.6376, dhidden_error=0.0119, tokens_per_s=1021.4),
        head_row("fused exact", 1.234, worst_logp_error_nat=0.00009328, dhidden_error=0.00166, tokens_per_s=1659.6),
        head_row("Liger", None),
        head_row("fused exact", 0.9, case="Small-N2048-frozen", trainable=False),
        *(head_row("fused exact", N / 1000, "scaling", axis="N", N=N) for N in (1024, 2048)),
        {"id": "stages/Small-N2048/fused exact/products", **stage, "stage": "products", "seconds": 0.7, "share": 0.7},
        {"id": "stages/Small-N2048/fused exact/softmax", **stage, "stage": "softmax", "seconds": 0.3, "share": 0.3},
        {"id": "step/model/shared", **step, "implementation": "shared", "median_s": 12.6, "extra_mib": 6033.6},
        {"id": "step/model/TRL", **step, "implementation": "TRL", "median_s": 32.5, "extra_mib": 9128.6},
    ]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A README with markers, and results in a folder beside it."""
    records.write(tmp_path / "results" / "cpu.json", sample())
    (tmp_path / "README.md").write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe rest.\n")
    return tmp_path


def report(project: Path, *options: str) -> int:
    return main([str(project / "results" / "cpu.json"), "--page", str(project / "README.md"), *options])


def cells(table: str, name: str) -> list[str]:
    """Of the first row with this name, what is in its other cells."""
    (line, *_) = (line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a call that must fail."""
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_readme_holds_the_selection_and_keeps_the_rest(project: Path) -> None:
    assert report(project) == 0
    text = (project / "README.md").read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\n\nThe rest.\n")
    assert "old" not in text
    assert cells(text, "naive bf16")[1:] == ["201", "0.638", "1.19"]
    assert cells(text, "**fused exact**")[1:] == ["**123**", "**9.33e-5**", "**0.166**"]
    assert cells(text, "**shared**") == ["**[12.6](results/cpu.json#L12)**", "**6,030**"]
    assert "Small-N2048-frozen" not in text
    for image in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (project / image).is_file()


def test_the_readme_of_a_project_has_a_table_a_device(project: Path) -> None:
    """The main case of the head without what failed, and nothing else of the page."""
    readme = project / "SHORT.md"
    readme.write_text(f"# Short\n\n{BEGIN}\n{END}\n")
    assert report(project, "--readme", str(readme)) == 0
    text = readme.read_text()
    assert cells(text, "naive bf16")[1:] == ["201", "0.638", "1.19"]
    assert "Liger" not in text
    assert "step" not in text
    assert "![" not in text
    assert len((project / "README.md").read_text()) > 2 * len(text)


@pytest.mark.parametrize("document", ["README.md", "results/README.md"])
def test_links_lead_to_the_line_of_their_row(project: Path, document: str) -> None:
    report(project)
    path = project / document
    links = re.findall(r"^\| ([^|]*) \|.*?\[([^]]*)\]\(([^)]*)#L(\d+)\)", path.read_text(), re.MULTILINE)
    assert len(links) >= 5
    for name, shown, target, line in links:
        row = json.loads((path.parent / target).read_text().splitlines()[int(line) - 1].rstrip(","))
        assert name.strip("*").startswith(row["implementation"])
        seconds = row.get("median_s", row.get("seconds"))
        assert shown == ("failed" if "failed" in row else significant(seconds))


def test_every_row_is_in_the_full_tables(project: Path) -> None:
    report(project)
    linked = set(re.findall(r"cpu\.json#L(\d+)\)", (project / "results" / "README.md").read_text()))
    assert linked >= {str(line) for line in records.read(project / "results" / "cpu.json").lines.values()}


def test_failed_rows_show_their_reason(project: Path) -> None:
    """On one line, with the table's bar escaped, and no number beside it."""
    report(project)
    time, *others = cells((project / "README.md").read_text(), "Liger")
    assert time == "[failed](results/cpu.json#L6): log-probs off by 3 nat \\| twice the budget"
    assert not any(others)


def test_the_yardstick_does_not_compete(project: Path) -> None:
    """Bare matmuls are fastest, and the fastest implementation is in bold."""
    report(project)
    text = (project / "README.md").read_text()
    assert cells(text, "*bare matmuls*")[0] == "[0.500](results/cpu.json#L3)"
    assert cells(text, "**fused exact**")[0] == "**[1.23](results/cpu.json#L5)**"


def test_check_writes_nothing(project: Path) -> None:
    before = (project / "README.md").read_text()
    assert report(project, "--check") == 1
    assert (project / "README.md").read_text() == before
    assert [path.name for path in (project / "results").iterdir()] == ["cpu.json"]


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("README.md", "12.6", "12.5"),
        ("results/README.md", "0.638", "0.637"),
        ("results/plots/cpu-step.svg", ">12.6<", ">12.5<"),
        ("results/cpu.json", "2.0051", "3.0051"),
    ],
)
def test_check_finds_an_edited_number(project: Path, path: str, old: str, new: str) -> None:
    report(project)
    assert report(project, "--check") == 0
    text = (project / path).read_text()
    assert old in text
    (project / path).write_text(text.replace(old, new))
    assert report(project, "--check") == 1


def test_check_finds_a_missing_plot(project: Path) -> None:
    report(project)
    (project / "results" / "plots" / "cpu-head.svg").unlink()
    assert report(project, "--check") == 1


@pytest.mark.parametrize("topic", ["head", "scaling", "stages", "step"])
def test_plots_are_small_svg_with_text(project: Path, topic: str) -> None:
    report(project)
    content = (project / "results" / "plots" / f"cpu-{topic}.svg").read_bytes()
    root = ElementTree.fromstring(content)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert {"time (s)", "products" if topic == "stages" else "extra memory (MiB)"} <= set(words)
    assert len(content) < 60_000
    assert report(project) == 0
    assert (project / "results" / "plots" / f"cpu-{topic}.svg").read_bytes() == content


def test_numbers_in_plots_keep_their_digits(project: Path) -> None:
    rows = [
        head_row("naive bf16", 2.0, worst_logp_error_nat=0.5),
        head_row("fused exact", 1.0, worst_logp_error_nat=1e-4),
    ]
    stage = {"suite": "stages", "case": "Small-N2048", "implementation": "fused exact", "stage": "softmax"}
    records.write(project / "results" / "cpu.json", [*rows, {"id": "stages/softmax", **stage, "seconds": 4.56e-5}])
    report(project)
    assert ">0.0001</text>" in (project / "results" / "plots" / "cpu-head.svg").read_text()
    assert ">0.0456</text>" in (project / "results" / "plots" / "cpu-stages.svg").read_text()


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def hidden(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", hidden)


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_the_error_says_how_to_get_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, str(project / "results" / "cpu.json"))
    assert "pip install 'fused-dpo[bench]'" in message
    assert not (project / "results" / "README.md").exists()


def test_check_without_matplotlib_compares_the_rows(project: Path, request: pytest.FixtureRequest) -> None:
    report(project)
    request.getfixturevalue("without_matplotlib")
    assert report(project, "--check") == 0
    plot = project / "results" / "plots" / "cpu-step.svg"
    plot.write_text(re.sub("rows [0-9a-f]{16}", "rows 0000000000000000", plot.read_text()))
    assert report(project, "--check") == 1


def test_missing_markers_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "README.md").write_text("# Title\n")
    message = refused(capsys, str(project / "results" / "cpu.json"), "--page", str(project / "README.md"))
    assert BEGIN in message
    assert END in message
    assert not (project / "results" / "README.md").exists()


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "empty.json"
    path.write_text('{"environment": {}, "rows": []}')
    assert "no rows" in refused(capsys, str(path))
    assert "missing.json" in refused(capsys, str(tmp_path / "missing.json"))


def test_reformatted_results_are_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links would lead to other lines."""
    path = project / "results" / "cpu.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    assert "reformatted" in refused(capsys, str(path))


@pytest.mark.parametrize("keep", [("id", "suite"), ("id", "implementation", "median_s"), ("id", "suite", "case")])
def test_rows_with_few_fields(project: Path, keep: tuple[str, ...]) -> None:
    rows = [{key: row[key] for key in (*keep, row.get("axis", "id")) if key in row} for row in sample()]
    records.write(project / "results" / "cpu.json", rows)
    assert report(project) == 0
    assert report(project, "--check") == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2312.95, "2,310"), (0.95, "0.950"), (9.996, "10.0"), (0.0015, "0.00150"), (9.3277e-5, "9.33e-5")],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_ours() -> None:
    assert all(map(is_ours, ("fused exact", "fused filtered", "shared", "shared, exact", "packed", "padded")))
    assert not any(map(is_ours, ("naive bf16", "packed logits", "padded logits", "TRL", "bare matmuls")))


def test_cases_say_what_their_logits_are_like() -> None:
    rows = [head_row("naive bf16", 1.0, entropy_nats=1.893, kept_fraction_of_block=0.0651)]
    assert sizes(rows).endswith("replay of 1.9 nats with 6.5 % of the columns above 2^-12 in a block of 128 rows")
    assert sizes([head_row("naive bf16", 1.0)]).endswith("real-logit replay")


class TestProject:
    """What the repository says of itself."""

    def test_tables_and_plots_are_those_of_the_results(self) -> None:
        assert main(["--check"]) == 0

    def test_times_in_the_text_are_those_of_their_rows(self) -> None:
        text = (PROJECT / "README.md").read_text()
        links = re.findall(r"\[([\d.,]+) s\]\((benchmarks/results/\w+\.json)#L(\d+)\)", text)
        assert len(links) >= 3
        for seconds, path, line in links:
            row = json.loads((PROJECT / path).read_text().splitlines()[int(line) - 1].rstrip(","))
            assert seconds == significant(row["median_s"])
