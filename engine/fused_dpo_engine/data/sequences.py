"""The answers of a row as token sequences: where the prompt ends, which tokens are scored, what does not fit.

The boundary is found on tokens, not on text: all sequences are tokenized whole, and the prompt is what they (and the
prompt tokenized alone) have in common. So a token that merges across prompt and answer is scored in full, and the
prompt tokens are the same in all sequences, which lets the trainer compute them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fused_dpo_engine.config.options import Pairing
from fused_dpo_engine.data.pairs import TokenPair, common_prefix
from fused_dpo_engine.data.ranking import token_pairs
from fused_dpo_engine.errors import bad_row


class EncodedRow(NamedTuple):
    """A rendered row in tokens, int32."""

    answers: list[np.ndarray]
    prompt: np.ndarray
    edges: list[list[int] | None]
    """For each answer, how many of its tokens the text up to each end of what is scored begins with; None where all
    that follows the prompt is scored. An empty list where finding them would take too long."""


@dataclass
class Sequences:
    """The answers of a row, each after the prompt."""

    prompt_length: int
    answers: list[np.ndarray]
    scored: list[np.ndarray | None]
    scores: Sequence[float] | None
    where: str

    def cut_prompt(self, max_length: int, bos: int | None) -> int:
        """Shorten the prompt of a row that does not fit at its beginning; returns the number of tokens it lost."""
        longest = max(len(answer) for answer in self.answers) - self.prompt_length
        cut = self.prompt_length - max(max_length - longest, max_length // 2)
        if cut <= 0:
            return 0
        kept = int(self.answers[0][0] == bos)
        self.answers = [np.delete(answer, slice(kept, kept + cut)) for answer in self.answers]
        self.scored = [None if positions is None else positions - cut for positions in self.scored]
        self.prompt_length -= cut
        return cut

    def cut_answers(self, max_length: int) -> list[int]:
        """Cut all sequences at `max_length`; returns the number of tokens each lost."""
        cuts = [max(0, len(answer) - max_length) for answer in self.answers]
        if any(cuts):
            if self.prompt_length >= max_length:
                what = f"the prompt's {self.prompt_length} tokens leave no room for a response in max_length"
                way_out = "raise --max-length, or shorten such prompts with --truncate-prompts"
                raise bad_row(self.where, f"{what} {max_length}; {way_out}", "prompt leaves no room")
            self.answers = [answer[:max_length].copy() for answer in self.answers]
            self.scored = [
                None if positions is None else positions[positions < max_length] for positions in self.scored
            ]
            what = f"agree in all of the first max_length {max_length} tokens; raise --max-length"
            _require_different(self.answers, self.where, what, "identical after truncation")
        if any(positions is not None and not len(positions) for positions in self.scored):
            what = "a response has no token of the assistant's within max_length; raise --max-length"
            raise bad_row(self.where, what, "nothing to score")
        return cuts

    def pairs(self, pairing: Pairing, ranking: int | None) -> list[TokenPair]:
        """Pair the answers, see `token_pairs`."""
        return token_pairs(
            self.prompt_length,
            self.answers,
            self.scores,
            self.where,
            pairing=pairing,
            ranking=ranking,
            scored=self.scored,
        )


def find_boundary(ids: EncodedRow, scores: Sequence[float] | None, where: str) -> tuple[Sequences, bool]:
    """Find where the prompt ends; also tells whether the prompt alone is more than all answers begin with.

    Args:
        ids: of one row.
        scores: of its answers, best first; None if it has none.
        where: the row, for messages of errors.

    Raises:
        DataError: two answers are the same tokens, or the sequences have no first token in common.
    """
    _require_different(ids.answers, where, "become the same tokens", "identical after tokenization")
    first = ids.answers[0]
    common = min(common_prefix(first, other) for other in (*ids.answers[1:], ids.prompt))
    merged = common < len(ids.prompt)
    # A response that is empty, or that another one begins with, still needs a token to score.
    prompt_length = min(common, *(len(answer) - 1 for answer in ids.answers))
    if prompt_length < 1:
        what = "both sequences must begin with a token that is not scored, as nothing predicts a first token, got none"
        way_out = "give a prompt that is not empty, or use a tokenizer that begins a text with a BOS token"
        raise bad_row(where, f"{what}; {way_out}", "no common beginning")
    if any(edges == [] for edges in ids.edges):
        what = "an answer has too many turns for them to be found among its tokens, as this tokenizer has no special"
        raise bad_row(where, f"{what} tokens between them; give --score all, or shorten it", "too many turns")
    scored = [None if edges is None else _between(edges, prompt_length) for edges in ids.edges]
    return Sequences(prompt_length, ids.answers, scored, scores, where), merged


def _between(edges: list[int], prompt_length: int) -> np.ndarray:
    """Find the tokens between pairs of edges; one that merges across the first edge is within, as a response's is."""
    spans = [np.arange(max(start, prompt_length), stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    return np.concatenate(spans)


def _require_different(answers: list[np.ndarray], where: str, what: str, reason: str) -> None:
    """Refuse two answers that are the same tokens; of more than two, those that differ are paired."""
    if len(answers) == 2 and np.array_equal(answers[0], answers[1]):
        raise bad_row(where, f"chosen and rejected {what}", reason)
