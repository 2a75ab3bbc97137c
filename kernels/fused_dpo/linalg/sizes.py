"""Sizes: how many parts, multiples, and even slices."""


def ceil_div(value: int, divisor: int) -> int:
    """Count the parts of at most `divisor` that make `value`."""
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    """Round `value` up to the next multiple."""
    return ceil_div(value, multiple) * multiple


def even_bounds(V: int, width: int) -> list[tuple[int, int]]:
    """Split V columns into the fewest nearly equal slices of at most `width`, and give their bounds."""
    count = ceil_div(V, min(width, V))
    return [(V * i // count, V * (i + 1) // count) for i in range(count)]


def bounds_of_part(bounds: list[tuple[int, int]], first: int, rows: int) -> list[tuple[int, int]]:
    """Cut slices of the whole to a part of it, `rows` long from `first` on, and count from there."""
    cut = ((max(start, first) - first, min(stop, first + rows) - first) for start, stop in bounds)
    return [(start, stop) for start, stop in cut if start < stop]
