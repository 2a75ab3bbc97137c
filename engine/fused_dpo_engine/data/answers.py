"""The answers of a row, best first, and the scores that they may have."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fused_dpo_engine.data.messages import conversation


class Answers(NamedTuple):
    """At least two answers to one prompt."""

    texts: tuple[Any, ...]
    """Best first: texts, or messages, as the row has them."""
    scores: tuple[float, ...] | None
    """Descending; None where the row has none."""
    used: frozenset[str]
    """Names of the columns that they came from."""


def read_answers(values: Mapping[str, Any], where: str) -> Answers | None:
    """Read the answers of a row, given its values that are not None; returns None if it has no column of answers."""
    if "chosen" in values and "rejected" in values:
        texts = conversation(values["chosen"]), conversation(values["rejected"])
        return Answers(texts, None, frozenset({"chosen", "rejected"}))
    return None
