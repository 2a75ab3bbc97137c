"""The pairs that the answers of a row become."""

from collections.abc import Sequence

import numpy as np

from fused_dpo_engine.config.options import Pairing
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.errors import bad_row


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
    scored: Sequence[np.ndarray | None] | None = None,
) -> list[TokenPair]:
    """Pair the token sequences of a row's answers.

    Args:
        prompt_length: tokens that all of them begin with, not scored.
        sequences: int32 arrays of the whole sequences, best first.
        scores: as in `ranked_pairs`.
        where: the row.
        pairing: as in `ranked_pairs`; "best" for a ranking.
        ranking: a number of the row's own if the loss looks at the ranking as a whole.
        scored: which tokens of each sequence are scored, see `TokenPair`.

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
    which = scored or [None] * len(sequences)
    return [
        TokenPair(prompt_length, sequences[i], sequences[j], where, margin, ranking, which[i], which[j])
        for i, j, margin in chosen
    ]
