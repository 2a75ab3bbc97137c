"""Names beside the points of a scatter plot, none over another or over a point."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

DISTANCES = (8, 14, 21, 29, 38, 48, 60, 75)
"""Points (1/72 inch) from the marker, tried in turn."""
SIDES = (0, 8, 4, 12, 2, 14, 6, 10, 1, 15, 7, 9, 3, 13, 5, 11)
"""Sixteenths of a turn, tried in turn: beside the marker first, then above and below."""
LINE_FROM = 13
"""Distance from which a line leads from the marker to its name."""
LINE = {"arrowstyle": "-", "linewidth": 0.6, "color": "#8c959f", "shrinkA": 0, "shrinkB": 3}


class Point(NamedTuple):
    """Where it is in data coordinates, its name, and how that is printed."""

    x: float
    y: float
    name: str
    style: dict[str, Any]


class Box(NamedTuple):
    """A rectangle on the canvas."""

    left: float
    bottom: float
    right: float
    top: float

    def holds(self, other: "Box") -> bool:
        """Whether `other` is inside."""
        across = self.left <= other.left and other.right <= self.right
        return across and self.bottom <= other.bottom and other.top <= self.top

    def meets(self, other: "Box") -> bool:
        """Whether the two overlap."""
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top


class Place(NamedTuple):
    """Offset of a name from its point, and which of its corners or sides is there."""

    dx: float
    dy: float
    ha: str
    va: str

    def box(self, at: Sequence[float], size: Sequence[float]) -> Box:
        """What a name of this width and height covers, for a point at `at`."""
        left = at[0] + self.dx - {"left": 0.0, "center": 0.5, "right": 1.0}[self.ha] * size[0]
        bottom = at[1] + self.dy - {"bottom": 0.0, "center": 0.5, "top": 1.0}[self.va] * size[1]
        return Box(left, bottom, left + size[0], bottom + size[1])


def places() -> Iterator[Place]:
    """Around a point, the nearest first."""
    for distance in DISTANCES:
        for side in SIDES:
            x, y = math.cos(side * math.pi / 8), math.sin(side * math.pi / 8)
            ha = "left" if x > 0.3 else "right" if x < -0.3 else "center"
            va = "bottom" if y > 0.3 else "top" if y < -0.3 else "center"
            yield Place(distance * x, distance * y, ha, va)


def arranged(where: Sequence[Any], sizes: Sequence[Any], frame: Box, taken: Sequence[Box]) -> list[Place]:
    """A free place for the name of each point, or one to its right; in the order that keeps the names nearest."""

    def one_by_one(order: Sequence[int]) -> dict[int, Place]:
        boxes, found = list(taken), {}
        for index in order:
            for place in places():
                box = place.box(where[index], sizes[index])
                if frame.holds(box) and not any(box.meets(other) for other in boxes):
                    break
            else:
                place, box = Place(DISTANCES[-1], 0, "left", "center"), None
            found[index] = place
            boxes += [box] if box else []
        return found

    def cost(found: dict[int, Place]) -> float:
        return sum(place.dx**2 + place.dy**2 for place in found.values())

    indices = range(len(where))
    orders = [sorted(indices, key=lambda index: sign * where[index][axis]) for axis in (0, 1) for sign in (-1, 1)]
    best = min(map(one_by_one, orders), key=cost)
    return [best[index] for index in indices]


def label_points(ax: Any, points: Sequence[Point], taken: Iterable[Any] = ()) -> None:
    """Name each point at a near, free place inside the axes.

    To be called when the layout is settled, on a figure of 72 dots an inch. `taken` are boxes to keep clear of.
    """
    where = [ax.transData.transform((point.x, point.y)) for point in points]
    texts = [
        ax.annotate(point.name, (point.x, point.y), (0, 0), textcoords="offset points", **point.style)
        for point in points
    ]
    extents = [text.get_window_extent() for text in texts]
    sizes = [(extent.width + 2, extent.height + 2) for extent in extents]
    markers = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in where]
    others = [Box(*box.extents) for box in taken]
    found = arranged(where, sizes, Box(*ax.get_window_extent().extents), [*markers, *others])
    for point, text, place in zip(points, texts, found, strict=True):
        text.set(position=(place.dx, place.dy), ha=place.ha, va=place.va, in_layout=False)
        if math.hypot(place.dx, place.dy) > LINE_FROM:
            ax.annotate("", (point.x, point.y), (place.dx, place.dy), textcoords="offset points", arrowprops=LINE)
