"""Sizes: how many parts, multiples, and even slices."""


def ceil_div(value: int, divisor: int) -> int:
    """How many parts of at most `divisor` make `value`."""
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return ceil_div(value, multiple) * multiple


def even_bounds(V: int, width: int) -> list[tuple[int, int]]:
    """Bounds of the fewest nearly equal slices of the vocabulary of at most `width` columns."""
    count = ceil_div(V, min(width, V))
    return [(V * i // count, V * (i + 1) // count) for i in range(count)]
