"""Rows of several answers, as token pairs."""

from collections.abc import Sequence

import numpy as np

from fused_dpo_engine.config.options import Pairing
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.data.ranking import token_pairs
from tests.engine.support.toys import SPECIAL_TOKENS, VOCAB

SHAPES = [(9, (3, 5, 4)), (4, (2, 2)), (7, (6, 3, 4, 2, 5)), (9, (4, 2, 3, 3)), (5, (3, 4, 2))]
"""Tokens of a prompt and of the answers to it."""


def sequences(prompt: int, lengths: Sequence[int], seed: int) -> list[np.ndarray]:
    """Random answers to a random prompt, each with the prompt before it."""
    random = np.random.default_rng(seed)
    head, *answers = (random.integers(len(SPECIAL_TOKENS), VOCAB, n).astype(np.int32) for n in (prompt, *lengths))
    return [np.concatenate((head, answer)) for answer in answers]


def ranked_pairs_of(
    shapes: Sequence[tuple[int, tuple[int, ...]]] = SHAPES, *, pairing: Pairing = "best", together: bool = True
) -> list[TokenPair]:
    """Pairs of rows with scores 0.5 apart, from rows 1, 2, ...; as rankings, or each pair on its own."""
    pairs: list[TokenPair] = []
    for number, (prompt, lengths) in enumerate(shapes):
        scores = [-0.5 * k for k in range(len(lengths))]
        pairs += token_pairs(
            prompt,
            sequences(prompt, lengths, number),
            scores,
            f"pairs.jsonl:{number + 1}",
            pairing=pairing,
            ranking=number if together else None,
        )
    return pairs
