"""JSON read strictly: what readers elsewhere settle without a word is refused."""

import json
from typing import Any


def read_json(text: str) -> Any:
    """Read a JSON text.

    Raises:
        ValueError: it is none, an object has a key twice (readers take the last, so one of the two answers would be
            trained on by chance), a number has thousands of digits, or it is nested too deep to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found
