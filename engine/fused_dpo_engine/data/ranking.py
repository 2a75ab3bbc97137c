"""More than two answers to a prompt: how rows hold them, and the pairs that they become."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fused_dpo_engine.config.options import Pairing
from fused_dpo_engine.data.formats import bad_row, short
from fused_dpo_engine.data.pairs import TokenPair

ANSWERS = ("responses", "completions", "answers", "generations")
"""Columns that hold a list of answers, all of them."""
SCORES, RANKS = ("score", "rating", "reward", "overall_score"), ("rank",)
"""Words for how good an answer is: more is better, or 1 is best. Columns have them with or without an s."""
TEXTS = ("text", "response", "completion", "answer", "content", "messages")
"""Where an answer that is an object holds its text or messages."""


def read_ranking(values: dict[str, Any], where: str) -> tuple[list[Any], list[float] | None] | None:
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
        Answers and scores, both best first. Scores are None where none are given: the first answer is the best, the
        others are in no order. Ranks are negated. None for a row without these columns.

    Raises:
        DataError: fewer than two answers, a score that is missing or no finite number, lists of unequal length, no two
            different scores, or a chosen answer that scores lower than a rejected one.
    """
    row = {name.lower().replace("-", "_"): value for name, value in values.items() if value is not None}
    if "chosen" in row and "rejected" in row:
        return _chosen_first(row, where)
    name = next((name for name in ANSWERS if name in row), None)
    if name is None:
        return None
    answers = row[name]
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


def ranked_pairs(scores: Sequence[float] | None, count: int, pairing: Pairing) -> list[tuple[int, int, float]]:
    """Choose which answers are compared: (better, worse, margin), by their places, best first.

    Args:
        scores: descending, or None if all that is known is that the first answer is the best.
        count: answers, at least two.
        pairing: "best" pairs the first answer with every one of lower score, "all" every two of different scores.

    Returns:
        Pairs with the difference of their scores, 0 without.
    """
    if scores is None:
        return [(0, worse, 0.0) for worse in range(1, count)]
    better = range(1 if pairing == "best" else count)
    return [(i, j, scores[i] - scores[j]) for i in better for j in range(i + 1, count) if scores[i] > scores[j]]


def token_pairs(
    prompt_length: int,
    sequences: Sequence[np.ndarray],
    scores: Sequence[float] | None,
    where: str,
    *,
    pairing: Pairing = "best",
    ranking: int | None = None,
) -> list[TokenPair]:
    """Pair the token sequences of a row's answers.

    Args:
        prompt_length: tokens that all of them begin with, not scored.
        sequences: int32 arrays of the whole sequences, best first.
        scores: as in `ranked_pairs`.
        where: the row.
        pairing: as in `ranked_pairs`; "best" for a ranking.
        ranking: a number of the row's own if the loss looks at the ranking as a whole.

    Returns:
        At least one pair. Two answers that are the same tokens are no pair.

    Raises:
        DataError: none is left.
    """
    chosen = [
        (better, worse, margin)
        for better, worse, margin in ranked_pairs(scores, len(sequences), pairing)
        if not np.array_equal(sequences[better], sequences[worse])
    ]
    if not chosen:
        what = "the answers that should be compared become the same tokens"
        raise bad_row(where, what, "identical after tokenization")
    if len(chosen) == 1:
        ranking = None
    return [TokenPair(prompt_length, sequences[i], sequences[j], where, margin, ranking) for i, j, margin in chosen]


def _chosen_first(row: dict[str, Any], where: str) -> tuple[list[Any], list[float] | None]:
    chosen, rejected = row["chosen"], row["rejected"]
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


def _scores(row: dict[str, Any], patterns: Sequence[str], where: str) -> list[float] | None:
    """Read the first column of scores or ranks that has one of the names; ranks become scores."""
    for words, sign in ((SCORES, 1.0), (RANKS, -1.0)):
        for name in (pattern.format(word=word) for word in words for pattern in patterns):
            if name in row:
                values = row[name] if isinstance(row[name], list) else [row[name]]
                return [sign * _number(value, name, where) for value in values]
    return None


def _score_of(answer: Any, name: str, where: str) -> float:
    """Read an answer's own score or rank."""
    row = {key.lower(): value for key, value in answer.items()} if isinstance(answer, dict) else {}
    scores = _scores(row, ("{word}",), where)
    if scores is None:
        rule = 'needs one of the columns "scores", "ratings", "rewards" or "ranks", or a score in every answer'
        raise bad_row(where, f'"{name}" {rule}, got the answer {short(answer)}', "no scores")
    return scores[0]


def _answer_of(answer: Any) -> Any:
    """Take the text or messages out of an object with a score; an answer that is none, or a message, is as it is."""
    if not isinstance(answer, dict):
        return answer
    if "role" in answer:
        return {key: value for key, value in answer.items() if key not in SCORES + RANKS}
    return next((answer[key] for key in TEXTS if key in answer), answer)


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        what = f'"{name}" must be finite numbers, got {short(value)}'
        raise bad_row(where, what, "scores that are no numbers")
    return float(value)
