"""Results as Markdown: tables whose rows link to their lines in the results file."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.heads.cases import BARE
from benchmarks.reporting.quantities import (
    HEAD,
    HEAD_SHORT,
    MEMORY,
    SCREENS,
    STAGE_SHARE,
    STEP,
    STEP_SHORT,
    Quantity,
    significant,
    time_of,
)
from benchmarks.reporting.records import Record
from benchmarks.reporting.selection import AXES, Row, failure, grouped, is_ours, of_suite, plain_cases


def escaped(text: str) -> str:
    """Write text into a cell: on one line, without the table's own bar."""
    return " ".join(text.split()).replace("|", "\\|")


def grid(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """Write a table; the first column is text, the others are numbers."""
    body = [header, ["---"] + ["--:"] * (len(header) - 1), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def name_of(row: Row) -> str:
    """Write the implementation's name: ours in bold, the yardstick in italics."""
    name = str(row.get("implementation", row["id"]))
    mark = "*" if name == BARE else "**" if is_ours(name) else ""
    return f"{mark}{escaped(name)}{mark}"


class Source(NamedTuple):
    """A results file, and the folder of the document that links to it."""

    record: Record
    folder: Path

    @property
    def rows(self) -> list[Row]:
        """All rows, in order."""
        return list(self.record.rows.values())

    def url(self, *rows: Row) -> str:
        """Make the address of the line of a row, or of the lines from the first to the last of several."""
        lines = sorted(self.record.lines[row["id"]] for row in rows)
        anchor = f"L{lines[0]}" + (f"-L{lines[-1]}" if lines[-1] > lines[0] else "")
        return f"{Path(os.path.relpath(self.record.path, self.folder)).as_posix()}#{anchor}"

    def caption(self) -> str:
        """Describe device, versions and commit that the numbers belong to."""
        known = dict(self.record.environment)
        device, commit, threads = (known.pop(key, None) for key in ("device", "commit", "threads"))
        features = known.pop("cpu_features", None)
        torch = {"torch": known.pop("torch", None)}
        versions = ", ".join(f"{name} {version}" for name, version in (torch | known).items() if version)
        machine = f"{device or 'unknown device'}{f' ({features})' if features else ''}"
        return f"{machine}{f', {threads} threads' if threads else ''}; {versions}; commit {commit}"

    def table(self, rows: Sequence[Row], time: Quantity, others: Sequence[Quantity]) -> str:
        """Write one line a row: the implementation, its time, linked to the results file, and what `others` ask for."""
        contenders = [row for row in rows if row.get("implementation") != BARE]
        columns = [time, *(column for column in others if column.among(rows))]
        best: dict[Quantity, str] = {}
        for column in columns:
            values = column.among(contenders)
            if column.best and len(set(values)) > 1:
                best[column] = significant(column.best(values))

        def cell(row: Row, column: Quantity) -> str:
            value = column.of(row)
            if value is None:
                return ""
            text = significant(value)
            shown = f"[{text}]({self.url(row)})" if column is time else text
            return f"**{shown}**" if row in contenders and text == best.get(column) else shown

        def line(row: Row) -> list[str]:
            if reason := failure(row):
                return [name_of(row), f"[failed]({self.url(row)}): {escaped(reason)}", *[""] * (len(columns) - 1)]
            return [name_of(row), *(cell(row, column) for column in columns)]

        return grid(["", *(column.header for column in columns)], map(line, rows))

    def linked(self, name: str, rows: Sequence[Row]) -> str:
        """Link the name of a case to its lines."""
        return f"[{escaped(name)}]({self.url(*rows)})"

    def head(self) -> list[str]:
        """Write every case and phase of the head."""
        parts = []
        for case, of_case in grouped(of_suite(self.rows, "head"), "case").items():
            parts.append(f"### Head: {self.linked(case, of_case)}\n\n{sizes(of_case)}")
            for phase, rows in grouped(of_case, "phase").items():
                parts.append(f"{phase}:\n\n{self.table(rows, time_of(rows), HEAD)}")
        return parts

    def scaling(self) -> list[str]:
        """Write an axis a table: implementations down, sizes across."""
        parts = []
        for axis, of_axis in grouped(of_suite(self.rows, "scaling"), "axis").items():
            time = time_of(of_axis)
            across = sorted({row[axis] for row in of_axis})
            lines = []
            for rows in grouped(of_axis, "implementation").values():
                by_size = {row[axis]: self.point(row, time) for row in rows}
                lines.append([name_of(rows[0]), *(by_size.get(size, "") for size in across)])
            title = self.linked(f"{AXES.get(axis, 'size')} {axis}", of_axis)
            fixed = sizes(of_axis, [other for other in AXES if other != axis])
            table = grid([f"{axis} =", *(f"{size:,}" for size in across)], lines)
            parts.append(f"### Scaling: {title}\n\n{fixed}. {time.header.capitalize()}, {MEMORY.header}:\n\n{table}")
        return parts

    def point(self, row: Row, time: Quantity) -> str:
        """Time and memory in one cell."""
        if reason := failure(row):
            return f"[failed]({self.url(row)}): {escaped(reason)}"
        seconds, *memory = (significant(value) for column in (time, MEMORY) for value in column.among([row]))
        return ", ".join([f"[{seconds}]({self.url(row)})", *memory])

    def stages(self) -> list[str]:
        """Write what each stage costs."""
        parts = []
        for case, rows in grouped(of_suite(self.rows, "stages"), "case").items():
            stages = [row | {"implementation": f"{row.get('implementation')}: {row.get('stage')}"} for row in rows]
            table = self.table(stages, time_of(rows, "seconds")._replace(best=None), [STAGE_SHARE])
            parts.append(f"### Stages: {self.linked(case, rows)}\n\n{table}")
        return parts

    def step(self) -> list[str]:
        """Write the whole training step."""
        parts = []
        for case, rows in grouped(of_suite(self.rows, "step"), "case").items():
            table = self.table(rows, time_of(rows), STEP)
            parts.append(f"### Whole step: {self.linked(case, rows)}\n\n{counts(rows)}\n\n{table}")
        return parts

    def tuning(self) -> list[str]:
        """Write variants of the kernels, and what was expected of them."""
        parts = []
        for phase, of_phase in grouped(of_suite(self.rows, "tuning"), "phase").items():
            for name, rows in grouped(of_phase, "implementation").items():
                time = time_of(rows)
                predicted = Quantity(f"predicted {time.header.removeprefix('time ')}", "predicted_s", None, time.factor)
                named = [row | {"implementation": f"{row['variant']}: {row['why']}"} for row in rows]
                table = self.table(named, time, [predicted, *HEAD])
                parts.append(f"### Tuning: {self.linked(f'{name}, {phase}', rows)}\n\n{sizes(rows)}\n\n{table}")
        return parts

    def screens(self) -> list[str]:
        """Write errors of coarse screens."""
        rows = of_suite(self.rows, "screens")
        if not rows:
            return []
        error, *others = SCREENS
        title = f"### {self.linked('Coarse screens', rows)}\n\n{counts(rows)}, {sizes(rows)}"
        return [f"{title}\n\n{self.table(rows, error, others)}"]

    def full(self, images: str) -> str:
        """Write everything in the file."""
        title = f"## {self.record.path.stem}\n\n{self.caption()}; [all rows]({self.record.path.name})."
        parts = [
            title,
            images,
            *self.head(),
            *self.scaling(),
            *self.stages(),
            *self.step(),
            *self.tuning(),
            *self.screens(),
        ]
        return "\n\n".join(part for part in parts if part)

    def brief(self) -> str:
        """Give the main case of the head as a table that says what it is; empty if the file has none."""
        for case, rows in plain_cases(self.rows).items():
            device, commit = (self.record.environment.get(key) for key in ("device", "commit"))
            title = f"**{device}**, commit {commit}: {self.linked(case, rows)}, forward and backward"
            measured = [row for row in rows if failure(row) is None]
            return f"{title}\n\n{self.table(measured, time_of(rows), HEAD_SHORT)}"
        return ""

    def short(self, images: str) -> str:
        """Write the main case of the head, the first of the step, and the plots; empty if the file has none of them."""
        parts = []
        for case, rows in list(plain_cases(self.rows).items())[:1]:
            title = f"Forward and backward of the head, {self.linked(case, rows)} ({sizes(rows)}):"
            parts += [title, self.table(rows, time_of(rows), HEAD_SHORT)]
        for case, rows in list(grouped(of_suite(self.rows, "step"), "case").items())[:1]:
            title = f"Whole training step, {self.linked(case, rows)} ({counts(rows)}):"
            parts += [title, self.table(rows, time_of(rows), STEP_SHORT)]
        parts += filter(None, [images])
        return "\n\n".join([f"**{self.caption()}**", *parts]) if parts else ""


def merged(rows: Sequence[Row]) -> Row:
    """Collect what is known of a case: of each field the first row's that has it."""
    known: dict[str, Any] = {}
    for row in rows:
        known = row | known
    return known


def sizes(rows: Sequence[Row], axes: Iterable[str] = AXES) -> str:
    """Describe the sizes and kind of a head's problem, as far as its rows tell."""
    known = merged(rows)
    parts = [f"{axis} = {known[axis]:,}" for axis in axes if axis in known]
    parts += [str(known["logits"]) + likeness(known)] if "logits" in known else []
    parts += [f"sequence lengths of {known['lengths']}"] if isinstance(known.get("lengths"), str) else []
    parts += ["weight frozen"] if known.get("trainable") is False else []
    return ", ".join(parts)


def likeness(known: Row) -> str:
    """Describe what the logits of a case are like, as far as its rows tell."""
    if not {"entropy_nats", "kept_fraction_of_block"} <= set(known):
        return ""
    kept = 100 * known["kept_fraction_of_block"]
    return f" of {known['entropy_nats']:.1f} nats with {kept:.1f} % of the columns above 2^-12 in a block of 128 rows"


def counts(rows: Sequence[Row]) -> str:
    """Describe the size of a step, as far as its rows tell."""
    known = merged(rows)
    return ", ".join(f"{known[key]:,} {key}" for key in ("pairs", "tokens") if key in known)
