"""Names beside the points of a scatter plot, none over another or over a point."""

from collections.abc import Iterable, Iterator, Sequence
from math import cos, pi, sin
from typing import Any, NamedTuple

DISTANCES = (8, 14, 21, 29, 38, 48, 60, 75)
"""Points (1/72 inch) from the marker, tried in turn."""
SIDES = (0, 8, 4, 12, 2, 14, 6, 10, 1, 15, 7, 9, 3, 13, 5, 11)
"""Sixteenths of a turn, tried in turn: beside the marker first, then above and below."""
NEAR = 14
"""From here on a line leads from the marker to its name."""


class Point(NamedTuple):
    """Where it is in data coordinates, its name, and how that is printed."""

    x: float
    y: float
    name: str
    style: dict[str, Any]


class Place(NamedTuple):
    """Offset of a name from its point, and which of its corners or sides is there."""

    dx: float
    dy: float
    ha: str
    va: str

    def box(self, at: Sequence[float], width: float, height: float) -> tuple[float, float, float, float]:
        """Left, bottom, right and top of the name of a point at `at`."""
        left = at[0] + self.dx - {"left": 0.0, "center": 0.5, "right": 1.0}[self.ha] * width
        bottom = at[1] + self.dy - {"bottom": 0.0, "center": 0.5, "top": 1.0}[self.va] * height
        return left, bottom, left + width, bottom + height


def places() -> Iterator[Place]:
    """Around a point, the nearest first."""
    for distance in DISTANCES:
        for side in SIDES:
            x, y = cos(side * pi / 8), sin(side * pi / 8)
            ha = "left" if x > 0.3 else "right" if x < -0.3 else "center"
            va = "bottom" if y > 0.3 else "top" if y < -0.3 else "center"
            yield Place(distance * x, distance * y, ha, va)


def label_points(ax: Any, points: Sequence[Point], taken: Iterable[Any] = ()) -> None:
    """Name each point at the nearest free place inside the axes; without one it stays to the right.

    To be called when the layout is settled, on a figure of 72 dots an inch. `taken` are boxes to keep clear of.
    """
    frame = ax.get_window_extent()
    where = [ax.transData.transform((point.x, point.y)) for point in points]
    boxes = [(box.x0, box.y0, box.x1, box.y1) for box in taken] + [(x - 5, y - 5, x + 5, y + 5) for x, y in where]

    def free(box: tuple[float, float, float, float]) -> bool:
        left, bottom, right, top = box
        inside = frame.x0 <= left and right <= frame.x1 and frame.y0 <= bottom and top <= frame.y1
        return inside and not any(left < x1 and x0 < right and bottom < y1 and y0 < top for x0, y0, x1, y1 in boxes)

    for point, at in sorted(zip(points, where, strict=True), key=lambda pair: -pair[1][1]):
        text = ax.annotate(point.name, (point.x, point.y), (0, 0), textcoords="offset points", **point.style)
        text.set_in_layout(False)
        extent = text.get_window_extent()
        size = extent.width + 2, extent.height + 2
        place = next((place for place in places() if free(place.box(at, *size))), Place(8, 0, "left", "center"))
        text.set(position=(place.dx, place.dy), ha=place.ha, va=place.va)
        boxes.append(place.box(at, *size))
        if place.dx**2 + place.dy**2 >= NEAR**2 - 1:
            line = {"arrowstyle": "-", "linewidth": 0.5, "color": "#8c959f", "shrinkA": 0, "shrinkB": 3}
            ax.annotate("", (point.x, point.y), (place.dx, place.dy), textcoords="offset points", arrowprops=line)
