"""The answers of a row, best first, and the scores that they may have."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from fused_dpo_engine.data.messages import conversation, parsed
from fused_dpo_engine.errors import bad_row, short

ANSWERS = ("responses", "completions", "answers", "generations")
"""Columns that hold a list of answers, all of them."""
SCORES, RANKS = ("score", "rating", "reward", "overall_score"), ("rank",)
"""Words for how good an answer is: more is better, or 1 is best. Columns have them with or without an s."""
TEXTS = ("text", "response", "completion", "answer", "content", "messages")
"""Where an answer that is an object holds its text or messages."""


class Answers(NamedTuple):
    """At least two answers to one prompt."""

    texts: tuple[Any, ...]
    """Best first: texts, or messages, as the row has them."""
    scores: tuple[float, ...] | None
    """Descending; None where the row has none: the first answer is the best, the others are in no order."""
    used: frozenset[str]
    """Names of the columns that they came from."""


class _Row:
    """A row's columns under plain names, `chosen_rating` for `chosen-rating`; remembers which were asked for."""

    def __init__(self, values: Mapping[str, Any]):
        self.names = {name.lower().replace("-", "_"): name for name, value in values.items() if value is not None}
        self.values, self.used = values, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Any:
        self.used.add(self.names[name])
        return self.values[self.names[name]]


def read_answers(values: Mapping[str, Any], where: str) -> Answers | None:
    """Read the answers of a row, best first, as they stand there: texts, messages or lists of messages.

    - `chosen` and `rejected`, where the latter may be a list of answers: texts, or lists of messages. (A list of
      messages is one conversation.) With scores of both (`chosen_score` and `rejected_score`, `score_chosen`,
      `chosen-rating`, ...; a list for a list), these say how far apart they are; the columns say which is better.
    - `responses`, `completions`, `answers` or `generations`: a list beside one of `scores`, `ratings`, `rewards` or
      `ranks`, or a list of objects with a score, rating or rank of their own. Answers of equal score stay in order.

    Args:
        values: the row by column; None counts as missing.
        where: the row, for errors.

    Returns:
        The answers, ranks as scores below 0; None for a row without these columns.

    Raises:
        DataError: fewer than two answers, a score that is missing or no finite number, lists of unequal length, no two
            different scores, or a chosen answer that scores lower than a rejected one.
    """
    row = _Row(values)
    if "chosen" in row and "rejected" in row:
        answers, scores = _chosen_first(row, where)
    elif name := next((name for name in ANSWERS if name in row), None):
        answers, scores = _ranked(row, name, where)
    else:
        return None
    texts = tuple(conversation(answer) for answer in answers)
    return Answers(texts, None if scores is None else tuple(scores), frozenset(row.used))


def _ranked(row: _Row, name: str, where: str) -> tuple[list[Any], list[float]]:
    answers = _listed(row[name])
    if not isinstance(answers, list) or len(answers) < 2:
        what = f'"{name}" must be a list of at least two answers, got {short(answers)}'
        raise bad_row(where, what, "fewer than two answers")
    scores = _scores(row, ("{word}", "{word}s"), where)
    if scores is None:
        scores = [_score_of(answer, name, where) for answer in answers]
    elif len(scores) != len(answers):
        what = f'"{name}" holds {len(answers)} answers, but there are {len(scores)} scores or ranks for them'
        raise bad_row(where, what, "unequal lengths")
    if len(set(scores)) == 1:
        what = f"answers must have two different scores at least, got {scores[0]:g} for all {len(scores)}"
        raise bad_row(where, what, "no two different scores")
    order = sorted(range(len(answers)), key=lambda i: -scores[i])
    return [_answer_of(answers[i]) for i in order], [scores[i] for i in order]


def _chosen_first(row: _Row, where: str) -> tuple[list[Any], list[float] | None]:
    chosen, rejected = row["chosen"], conversation(row["rejected"])
    several = isinstance(rejected, list) and not any(isinstance(answer, dict) for answer in rejected)
    others = rejected if several else [rejected]
    if not others:
        raise bad_row(where, '"rejected" must hold at least one answer, got an empty list', "fewer than two answers")
    best = _scores(row, ("chosen_{word}", "{word}_chosen"), where)
    worse = _scores(row, ("rejected_{word}", "{word}_rejected", "rejected_{word}s", "{word}s_rejected"), where)
    if best is None or worse is None:
        return [chosen, *others], None
    if len(best) != 1 or len(worse) != len(others):
        what = (
            f"1 chosen and {len(others)} rejected answers need a score or rank each, got {len(best)} and {len(worse)}"
        )
        raise bad_row(where, what, "unequal lengths")
    if max(worse) > best[0]:
        what = f'"chosen" scores lower than "rejected": {best[0]:g} and {max(worse):g}'
        raise bad_row(where, f"{what}; exchange them, or remove the scores", "chosen scores lower")
    if min(worse) == best[0]:  # a tie of the scores, which the columns decide
        return [chosen, *others], None
    order = sorted(range(len(others)), key=lambda i: -worse[i])
    return [chosen, *(others[i] for i in order)], [best[0], *(worse[i] for i in order)]


def _scores(row: _Row, patterns: Sequence[str], where: str) -> list[float] | None:
    """Read the first column of scores or ranks that has one of the names; ranks become scores."""
    for words, sign in ((SCORES, 1.0), (RANKS, -1.0)):
        for name in (pattern.format(word=word) for word in words for pattern in patterns):
            if name in row:
                values = _listed(row[name])
                values = values if isinstance(values, list) else [values]
                return [sign * _number(value, name, where) for value in values]
    return None


def _score_of(answer: Any, name: str, where: str) -> float:
    """Read an answer's own score or rank."""
    scores = _scores(_Row(answer if isinstance(answer, dict) else {}), ("{word}",), where)
    if scores is None or len(scores) != 1:
        rule = 'needs one of the columns "scores", "ratings", "rewards" or "ranks", or one score in every answer'
        raise bad_row(where, f'"{name}" {rule}, got the answer {short(answer)}', "no scores")
    return scores[0]


def _answer_of(answer: Any) -> Any:
    """Take the text or messages out of an object with a score; an answer that is none, or a message, is as it is."""
    if not isinstance(answer, dict):
        return answer
    if "role" in answer:
        return {key: value for key, value in answer.items() if key not in SCORES + RANKS}
    return next((answer[key] for key in TEXTS if key in answer), answer)


def _listed(value: Any) -> Any:
    """Read a list that a table holds as JSON text."""
    found = parsed(value) if isinstance(value, str) and value.lstrip()[:1] == "[" else None
    return found if isinstance(found, list) else value


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, (str, int)) and not isinstance(value, bool):  # text, as in tables
        with suppress(ValueError, OverflowError):
            value = float(value)
    if not isinstance(value, float) or not math.isfinite(value):
        what = f'"{name}" must be finite numbers, got {short(value)}'
        raise bad_row(where, what, "scores that are no numbers")
    return value
