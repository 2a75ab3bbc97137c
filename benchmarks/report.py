"""Tables and plots of the results, from the results files alone.

    python -m benchmarks.report [RESULTS.json ...] [--plots DIR] [--readme FILE.md] [--page FILE.md] [--check]

Writes the plots, README.md beside the results with every row, a selection with plots between the markers of a page
(docs/benchmarks.md), and one table a device between those of the project's README. With --check nothing is written, and
the exit status is 1 if what is on disk is not what would be written.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.reporting import plots
from benchmarks.reporting.records import FOLDER, Record, read
from benchmarks.reporting.tables import Source

PROJECT = Path(__file__).parents[1]
BEGIN = "<!-- benchmarks: begin (made by python -m benchmarks.report) -->"
END = "<!-- benchmarks: end -->"
MADE = "<!-- Made by python -m benchmarks.report from the results files beside it; do not edit. -->"


def chosen(paths: Sequence[Path]) -> list[Record]:
    """Read the results files named, or those of the project; ValueError if there is nothing to report."""
    records = [read(path) for path in paths] if paths else list(known(sorted(FOLDER.glob("*.json"))))
    if not any(record.rows for record in records):
        raise ValueError(f"no rows in {', '.join(map(str, paths)) or FOLDER}: nothing to report")
    if len({record.path.resolve().parent for record in records}) > 1:
        raise ValueError("the results files must be in one folder: their tables and plots go there")
    for record in records:
        lines = record.path.read_text().splitlines()
        for name, line in record.lines.items():
            if f'"id": {json.dumps(name)}' not in "".join(lines[line - 1 : line]):
                raise ValueError(f"{record.path} has been reformatted: {name} is not on line {line}, where links lead")
    return records


def known(paths: Sequence[Path]) -> Iterator[Record]:
    """Read those of the files that hold rows of these benchmarks."""
    for path in paths:
        try:
            yield read(path)
        except ValueError:
            continue


def images(record: Record, folder: Path, beside: Path) -> str:
    """Show the plots of a results file as Markdown images, from a document in the folder `beside`."""
    device = record.environment.get("device", record.path.stem)
    parts = []
    for topic, title in plots.TITLES.items():
        if plots.shown(record, topic):
            path = Path(os.path.relpath(plot_path(record, folder, topic), beside)).as_posix()
            parts.append(f"![{device}: {title}]({path})")
    return "\n\n".join(parts)


def plot_path(record: Record, folder: Path, topic: str) -> Path:
    """Tell where a plot goes."""
    return folder / f"{record.path.stem}-{topic}.svg"


def spliced(document: Path, selections: Sequence[str]) -> str:
    """Put the selections that are not empty between the markers of a document."""
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{document} has no markers; put these two lines where the results belong:\n{BEGIN}\n{END}")
    selection = "\n\n".join(filter(None, selections))
    return f"{before}{BEGIN}\n{selection}\n{END}{after}"


def texts(records: Sequence[Record], folder: Path, readme: Path | None, page: Path | None) -> dict[Path, str]:
    """Make the Markdown files.

    Args:
        records: results files, all in one folder.
        folder: of the plots.
        readme: document that gets a table a device.
        page: document that gets a selection with plots.
    """
    results = records[0].path.parent
    sections = [Source(record, results).full(images(record, folder, results)) for record in records]
    written = {results / "README.md": "\n\n".join([MADE, "# Results", *sections]) + "\n"}
    if readme:
        written[readme] = spliced(readme, [Source(record, readme.parent).brief() for record in records])
    if page:
        beside = page.parent
        selections = [Source(record, beside).short(images(record, folder, beside)) for record in records]
        everything = Path(os.path.relpath(results / "README.md", beside)).as_posix()
        written[page] = spliced(page, [*selections, f"All cases, and what failed: [{everything}]({everything})."])
    return written


def is_current(path: Path, record: Record, topic: str) -> bool:
    """Tell whether a plot on disk is the one that would be drawn.

    Where matplotlib is missing, or in another version than drew it, the rows that it was made from have to be the same.
    """
    if not path.is_file():
        return False
    text, rows = path.read_text(), plots.shown(record, topic)
    try:
        same_version = f"<dc:title>{plots.creator()}</dc:title>" in text
    except ImportError:
        same_version = False
    return text == plots.svg(rows, topic) if same_version else plots.digest(rows) in text


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="results files, in one folder (default: the project's)")
    parser.add_argument("--plots", type=Path, help="folder of the plots (default: plots, beside the results)")
    parser.add_argument(
        "--readme", type=Path, help="gets a table a device between its markers (default: the project's)"
    )
    parser.add_argument(
        "--page", type=Path, help="gets a selection with plots (default: the project's docs/benchmarks.md)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything is out of date")
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the documents and plots, or check them."""
    parser, options = parse(arguments)
    try:
        records = chosen(options.results)
        results = records[0].path.parent
        folder = options.plots or results / "plots"
        of_project = results.resolve() == FOLDER.resolve()
        readme = options.readme or (PROJECT / "README.md" if of_project else None)
        page = options.page or (PROJECT / "docs" / "benchmarks.md" if of_project else None)
        written = texts(records, folder, readme, page)
        drawn = [(plot_path(record, folder, topic), record, topic) for record in records for topic in plots.TITLES]
        drawn = [(path, record, topic) for path, record, topic in drawn if plots.shown(record, topic)]
        if options.check:
            stale = [path for path, text in written.items() if not path.is_file() or path.read_text() != text]
            stale += [path for path, record, topic in drawn if not is_current(path, record, topic)]
            for path in stale:
                print(f"{path} does not match the results; run python -m benchmarks.report")
            return 1 if stale else 0
        written |= {path: plots.svg(plots.shown(record, topic), topic) for path, record, topic in drawn}
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
