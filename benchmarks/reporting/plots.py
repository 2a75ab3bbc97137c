"""Results as small SVG files: text stays text, and the same rows give the same bytes."""

import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.heads.cases import BARE
from benchmarks.reporting.quantities import LOGP_ERROR, MEMORY, STAGE_SHARE, significant, time_of
from benchmarks.reporting.records import Record
from benchmarks.reporting.selection import AXES, Row, grouped, is_ours, number, of_suite, plain_cases

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "head": "time, extra memory and error of the head, forward and backward",
    "scaling": "time and extra memory against tokens, vocabulary and hidden size",
    "stages": "cost of each stage",
    "step": "time and extra memory of a whole training step",
}

HEAD_CASES = 3
"""So many cases of the head are drawn."""

INK, FAINT = "#24292f", "#d0d7de"
OURS = ("#d55e00", "#e69f00", "#b22222", "#f08060")
OTHERS = ("#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#5b5b5b", "#332288", "#117733", "#aa4499")
"""Warm colours are ours, cold ones the others': told apart with any colour vision, and by the markers without any."""
MARKERS = "s^vPXphd*"

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "svg.hashsalt": "fused-dpo",
    "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    # An opaque ground: readable on a dark page too.
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "#ffffff"),
}


def shown(record: Record, topic: str) -> list[Row]:
    """Select the rows that a plot is made of."""
    rows = record.rows.values()
    if topic == "head":
        suite = [row for of_case in list(plain_cases(rows).values())[:HEAD_CASES] for row in of_case]
    else:
        suite = of_suite(rows, topic)
    key = "seconds" if topic == "stages" else "median_s"
    return [row for row in suite if number(row, key) is not None]


def digest(rows: Sequence[Row]) -> str:
    """Name the rows a plot was made from, by a number that the file holds."""
    return "rows " + hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def creator() -> str:
    """Name what a file was made by, with the version, or raise an error that says how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("the plots need matplotlib: pip install 'fused-dpo[bench]'") from None
    return f"matplotlib {matplotlib.__version__}"


def svg(rows: Sequence[Row], topic: str) -> str:
    """Draw the plot as the text of an SVG file."""
    made_by = creator()
    import matplotlib

    draw = {"head": head, "scaling": scaling, "stages": stages, "step": step}[topic]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        file = io.StringIO()
        metadata = {"Creator": made_by, "Date": None, "Description": digest(rows), "Title": TITLES[topic]}
        draw(rows).savefig(file, format="svg", metadata=metadata)
    return compact(file.getvalue())


def compact(text: str) -> str:
    """Write the same picture in half the bytes: hundredths of a point, and each style once."""
    styles: dict[str, str] = {}

    def named(match: re.Match[str]) -> str:
        return f'class="{styles.setdefault(match[1], f"s{len(styles)}")}"'

    text = re.sub("<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)  # not what is written
    text = re.sub(r'style="([^"]*)"', named, text)
    rules = "".join(f"\n.{name}{{{style}}}" for style, name in styles.items())
    text = text.replace("</style>", f"{rules}\n</style>", 1)
    return "\n".join(line.strip() for line in text.splitlines()) + "\n"


def panels(width: float, height: float, rows: int, columns: int, **options: Any) -> tuple["Figure", Any]:
    """Make a figure of so many inches, and its axes as a 2D array."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def plain(value: float, _: object = None) -> str:
    """Format a tick's number: 0.0005, 20, 4,096, 131k."""
    return f"{value / 1000:,.0f}k" if value >= 1e5 else f"{value:,.0f}" if value >= 1000 else f"{value:.7g}"


def log_axis(axis: Any, values: Sequence[float], *, ticks: bool = False) -> None:
    """Log scale with room around the outermost `values`; ticks at these, or at round numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    low, high = min(values, default=1.0), max(values, default=1.0)
    decades = math.log10(high / low)
    subs = (1,) if decades > 2.5 else (1, 2, 5) if decades > 1 else (1, 1.5, 2, 3, 4, 5, 7)
    margin = 1.1 if ticks else max((high / low) ** 0.13, 1.15)
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low / margin, high * margin)})
    axis.set_major_locator(FixedLocator(list(values)) if ticks else LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_locator(NullLocator())


def head(rows: Sequence[Row]) -> "Figure":
    """Draw a line of panels a case: memory and error against time; nearer to the lower left corner is better."""
    cases = grouped(rows, "case")
    styles = line_styles(grouped(rows, "implementation"))
    figure, axes = panels(9.4, 3.2 * len(cases) + 0.7, len(cases), 2)
    legend: dict[str, Any] = {}
    for line, (case, of_case) in zip(axes, cases.items(), strict=True):
        time = time_of(of_case)
        for ax, quantity in zip(line, (MEMORY, LOGP_ERROR), strict=True):
            drawn = []
            for name, of_name in grouped(of_case, "implementation").items():
                x, y = time.of(of_name[0]), quantity.of(of_name[0])
                if name == BARE and x:
                    legend[name] = ax.axvline(x, **styles[name])
                elif x and y and y > 0:
                    point = {"linestyle": "", "markersize": 9 if is_ours(name) else 7}
                    (legend[name],) = ax.plot(x, y, **styles[name] | point)
                    drawn.append(y)
            log_axis(ax.xaxis, time.among(of_case))
            log_axis(ax.yaxis, drawn)
            ax.set(xlabel=time.header, ylabel=quantity.header)
        line[0].set_title(case)
    add_legend(figure, styles, legend)
    return figure


def add_legend(figure: "Figure", order: Iterable[str], lines: dict[str, Any]) -> None:
    """Put a legend below all panels, ours in bold."""
    names = [name for name in order if name in lines]
    texts = figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=4).get_texts()
    for name, text in zip(names, texts, strict=True):
        text.set_fontweight("bold" if is_ours(name) else "normal")


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Choose a colour and a marker for each implementation; ours are thick and on top."""
    styles: dict[str, dict[str, Any]] = {}
    count = {True: 0, False: 0}
    for name in names:
        if name == BARE:
            styles[name] = {"color": INK, "linestyle": ":", "linewidth": 1.2}
            continue
        ours = is_ours(name)
        colors, markers, index = (OURS, "oD", count[ours]) if ours else (OTHERS, MARKERS, count[ours])
        look = {"linewidth": 2.4, "markersize": 6, "zorder": 4} if ours else {"linewidth": 1.1, "markersize": 4.5}
        styles[name] = {"color": colors[index % len(colors)], "marker": markers[index % len(markers)], **look}
        count[ours] += 1
    return styles


def scaling(rows: Sequence[Row]) -> "Figure":
    """Draw a column of panels an axis: time above, memory below; both axes logarithmic, one line an implementation."""
    columns = grouped(rows, "axis")
    styles = line_styles(grouped(rows, "implementation"))
    figure, axes = panels(3.2 * len(columns) + 0.6, 6.4, 2, len(columns), sharex="col", sharey="row")
    quantities = (time_of(rows), MEMORY)
    legend: dict[str, Any] = {}
    for column, (axis, of_axis) in zip(axes.T, columns.items(), strict=True):
        for ax, quantity in zip(column, quantities, strict=True):
            for name, of_name in grouped(of_axis, "implementation").items():
                curve = sorted((row[axis], value) for row in of_name if (value := quantity.of(row) or 0) > 0)
                if curve:
                    (legend[name],) = ax.plot(*zip(*curve, strict=True), **styles[name])
            log_axis(ax.xaxis, sorted({row[axis] for row in of_axis}), ticks=True)
        fixed = [f"{other} = {of_axis[0][other]:,}" for other in AXES if other != axis and other in of_axis[0]]
        column[0].set_title(", ".join(fixed))
        column[1].set_xlabel(f"{AXES.get(axis, 'size')} {axis}")
    for line, quantity in zip(axes, quantities, strict=True):
        log_axis(line[0].yaxis, [value for value in quantity.among(rows) if value > 0])
        line[0].set_ylabel(quantity.header)
    add_legend(figure, styles, legend)
    return figure


def bars(ax: Any, names: Sequence[str], values: Sequence[float], texts: Sequence[str], ours: Sequence[bool]) -> None:
    """Draw horizontal bars from the top down, each with its text at the end."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    drawn = ax.barh(range(len(names)), values, color=[OURS[0] if own else OTHERS[0] for own in ours], height=0.7)
    ax.bar_label(drawn, texts, padding=3, fontsize=8)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(FuncFormatter(plain))


def stages(rows: Sequence[Row]) -> "Figure":
    """Draw a line of panels a case, a panel an implementation, a bar a stage."""
    cases = {case: grouped(of_case, "implementation") for case, of_case in grouped(rows, "case").items()}
    columns = max(map(len, cases.values()))
    heights = [max(map(len, of_case.values())) for of_case in cases.values()]
    height = sum(0.26 * most + 0.75 for most in heights)
    figure, axes = panels(4.7 * columns, height, len(cases), columns, height_ratios=heights)
    for line, (case, of_case) in zip(axes, cases.items(), strict=True):
        together = [row for of_name in of_case.values() for row in of_name]
        time = time_of(together, "seconds")
        for ax in line[len(of_case) :]:
            ax.set_visible(False)
        for ax, (name, of_name) in zip(line, of_case.items(), strict=False):
            values = time.among(of_name)
            shares = [f"  ({share:.0f} %)" if (share := STAGE_SHARE.of(row)) is not None else "" for row in of_name]
            texts = [significant(value) + share for value, share in zip(values, shares, strict=True)]
            bars(ax, [str(row.get("stage")) for row in of_name], values, texts, [is_ours(name)] * len(values))
            ax.set(title=f"{case}, {name}", xlabel=time.header, xlim=(0, max(time.among(together)) * 1.3))
    return figure


def step(rows: Sequence[Row]) -> "Figure":
    """Draw a line of panels a case: time, and memory; a bar a way."""
    cases = grouped(rows, "case")
    heights = [len(of_case) for of_case in cases.values()]
    figure, axes = panels(9.4, sum(0.3 * count + 0.85 for count in heights), len(cases), 2, height_ratios=heights)
    for line, (case, of_case) in zip(axes, cases.items(), strict=True):
        names = [str(row.get("implementation")) for row in of_case]
        for ax, quantity in zip(line, (time_of(of_case), MEMORY), strict=True):
            values = [quantity.of(row) or 0.0 for row in of_case]
            bars(
                ax, names, values, [significant(value) if value else "" for value in values], list(map(is_ours, names))
            )
            ax.set(xlabel=quantity.header, xlim=(0, max(values) * 1.2 or 1.0))
        line[0].set_title(case)
        line[1].tick_params(labelleft=False)
    return figure
