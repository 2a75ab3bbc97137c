"""Token pairs: what the rest of the engine trains on, their statistics, and the held-out split."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fused_dpo_engine.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class TokenPair:
    """Two token sequences that begin with the same prompt; compared by identity.

    `prompt_length` (>= 1) tokens are common to both and not scored. Of the rest of each sequence (>= 1 token) all is
    scored, or what `chosen_scored` and `rejected_scored` say: the turns of the assistant in an answer of several.
    `chosen_ids` and `rejected_ids` are int32 arrays of the full sequences; `where` names the row they came from.
    `margin` (>= 0) is how much better chosen scored, 0 without scores. Pairs with the same `ranking` (>= 0) are the
    best answer of one row against each of its others: they have the same prompt and stay in one forward pass.
    """

    prompt_length: int
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    where: str
    margin: float = 0.0
    ranking: int | None = None
    chosen_scored: np.ndarray | None = None
    """int64, ascending, positions in `chosen_ids`, each at least `prompt_length`; None: all of these."""
    rejected_scored: np.ndarray | None = None
    """int64, the same for `rejected_ids`."""
    reference: tuple[float, float] | None = None
    """Log-probs of the reference that the data brings, of exactly what is scored of the two sequences."""

    @property
    def sides(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Tokens and scored positions of the chosen sequence, and of the rejected one."""
        return (
            (self.chosen_ids, self._positions(self.chosen_ids, self.chosen_scored)),
            (self.rejected_ids, self._positions(self.rejected_ids, self.rejected_scored)),
        )

    def _positions(self, ids: np.ndarray, scored: np.ndarray | None) -> np.ndarray:
        return np.arange(self.prompt_length, len(ids)) if scored is None else scored

    @property
    def keys(self) -> tuple[bytes, bytes]:
        """What makes the chosen sequence, and the rejected one, equal to others: its tokens, and which are scored."""
        return (
            self.chosen_ids.tobytes() + (b"" if self.chosen_scored is None else self.chosen_scored.tobytes()),
            self.rejected_ids.tobytes() + (b"" if self.rejected_scored is None else self.rejected_scored.tobytes()),
        )

    @property
    def chosen_length(self) -> int:
        """Scored tokens of the chosen sequence."""
        scored = self.chosen_scored
        return len(self.chosen_ids) - self.prompt_length if scored is None else len(scored)

    @property
    def rejected_length(self) -> int:
        """Scored tokens of the rejected sequence."""
        scored = self.rejected_scored
        return len(self.rejected_ids) - self.prompt_length if scored is None else len(scored)

    @property
    def num_tokens(self) -> int:
        """Tokens of both sequences, the prompt counted in each."""
        return len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def prompt_key(self) -> bytes:
        """The prompt's tokens, equal for equal prompts."""
        return self.chosen_ids[: self.prompt_length].tobytes()


@dataclass(frozen=True, slots=True)
class LengthStatistics:
    """Mean, 95th percentile and maximum of a number of tokens over the pairs."""

    mean: float
    p95: float
    max: int

    def __str__(self) -> str:
        return f"mean {self.mean:.1f}, p95 {self.p95:.0f}, max {self.max}"


@dataclass(frozen=True, slots=True)
class TokenizationReport:
    """What became of the rows. Counts of cuts and boundaries are over the pairs kept.

    `skipped` counts rows by reason; `tokens_cut` adds prompt tokens (once a pair) and response tokens;
    `merged_boundaries` counts rows whose prompt, tokenized alone, does not begin both sequences.
    `implied_prompts` counts rows without a prompt, whose answers share their beginning; `unused_columns` names columns
    that held something which no row's pair came from. `spelled_rows` counts rows whose texts spell special tokens of
    the tokenizer, which become these tokens, as they do when the model serves. `brought` counts pairs with a column of
    reference log-probs, `brought_taken` those of them that are about the pair as it is scored. `chosen_tokens` and
    `rejected_tokens` count scored tokens.
    """

    max_length: int
    rows_read: int
    pairs_kept: int
    skipped: dict[str, int]
    prompts_cut: int
    responses_cut: int
    tokens_cut: int
    merged_boundaries: int
    implied_prompts: int
    unused_columns: tuple[str, ...]
    spelled_rows: int
    brought: int
    brought_taken: int
    prompt_tokens: LengthStatistics
    chosen_tokens: LengthStatistics
    rejected_tokens: LengthStatistics

    def summary(self) -> str:
        """Say it in a few lines, those that say "nothing happened" left out."""
        lines = [f"{self.pairs_kept} pairs of {self.rows_read} rows"]
        if self.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
            lines.append(f"skipped {sum(self.skipped.values())} rows: {reasons}")
        if self.tokens_cut:
            what = f"{self.prompts_cut} prompts and {self.responses_cut} responses cut"
            lines.append(f"{what} to fit max_length {self.max_length}, {self.tokens_cut} tokens lost")
        if self.merged_boundaries:
            lines.append(f"{self.merged_boundaries} prompts merge with the response; the merged tokens are scored")
        if self.implied_prompts:
            lines.append(f"{self.implied_prompts} rows have no prompt: the words that their texts share are the prompt")
        if self.unused_columns:
            lines.append(f"columns not used: {', '.join(self.unused_columns)}")
        if self.spelled_rows:
            lines.append(
                f"{self.spelled_rows} rows spell special tokens in their texts, and are trained on these tokens"
            )
        if self.brought:
            left = self.brought - self.brought_taken
            why = f", {left} cannot be taken: cut, merged, of several answers, or not two log-probs" if left else ""
            lines.append(f"reference log-probs: {self.brought} pairs bring theirs{why}")
        lines.append(f"prompt tokens: {self.prompt_tokens}")
        lines.append(f"chosen tokens: {self.chosen_tokens}")
        lines.append(f"rejected tokens: {self.rejected_tokens}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class TokenizedPairs:
    """The pairs, in the order of their rows, and the report of how they came about."""

    pairs: list[TokenPair]
    report: TokenizationReport


def digest_pairs(pairs: Iterable[TokenPair]) -> str:
    """Digest all that training sees of the pairs and their order, into 32 hexadecimal digits."""
    seen = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        rest = (pair.prompt_length, pair.margin, pair.ranking, *map(len, pair.keys))
        seen.update(repr(rest).encode() + b"".join(pair.keys))
    return seen.hexdigest()


def split_pairs(pairs: Sequence[TokenPair], fraction: float, seed: int) -> tuple[list[TokenPair], list[TokenPair]]:
    """Split into training and held-out pairs, those with the same prompt tokens on the same side.

    Which prompts are held out depends on `seed` and the tokens alone, not on the order of the pairs; both sides keep
    the given order. The held-out side gets at most `fraction` of the pairs, unless that is less than one prompt's.
    Prompts are compared as they are in the pairs: where a boundary was merged, was only implied, or a prompt was cut,
    equal texts may have become different tokens.

    Args:
        pairs: at least two, with at least two different prompts.
        fraction: share to hold out, in (0, 1).
        seed: any integer of at most 64 bits.

    Returns:
        (train, held_out), each with at least one pair.

    Raises:
        DataError: the pairs cannot be split so.
    """
    if not 0 < fraction < 1:
        raise DataError(f"the held-out fraction must be between 0 and 1, got {fraction}")
    groups = {pairs[group[0]].prompt_key: group for group in prompt_groups(pairs, range(len(pairs)))}
    if len(groups) < 2:
        raise DataError(
            f"holding out pairs needs at least two different prompts, got {len(groups)} in {len(pairs)} pairs; "
            "give a separate evaluation set, or hold out none"
        )
    salt = seed.to_bytes(8, "little", signed=True)
    shuffled = sorted(groups, key=lambda prompt: hashlib.blake2b(prompt, digest_size=16, salt=salt).digest())
    room = max(1, round(fraction * len(pairs)))
    held_out: set[int] = set()
    for prompt in shuffled[:-1]:
        if len(groups[prompt]) <= room - len(held_out):
            held_out.update(groups[prompt])
    if not held_out:
        held_out.update(groups[min(shuffled, key=lambda prompt: len(groups[prompt]))])
    return (
        [pair for index, pair in enumerate(pairs) if index not in held_out],
        [pair for index, pair in enumerate(pairs) if index in held_out],
    )


def length_statistics(lengths: Iterable[int]) -> LengthStatistics:
    """Compute the statistics of at least one length."""
    values = np.fromiter(lengths, dtype=np.int64)
    return LengthStatistics(float(values.mean()), float(np.percentile(values, 95)), int(values.max()))


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Measure the longest common prefix of two token sequences."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    first = int(different.argmax()) if length else 0
    return first if length and different[first] else length


def prompt_groups(pairs: Sequence[TokenPair], indices: Sequence[int]) -> list[list[int]]:
    """Group the indices by the tokens of their prompts, groups and members in the order given."""
    groups: dict[bytes, list[int]] = {}
    for index in indices:
        groups.setdefault(pairs[index].prompt_key, []).append(index)
    return list(groups.values())


def ranking_groups(pairs: Sequence[TokenPair], indices: Sequence[int]) -> list[list[int]]:
    """Group the indices of each ranking, groups and members in the order given; a pair without one stands alone."""
    groups: dict[int, list[int]] = {}
    for index in indices:
        ranking = pairs[index].ranking
        groups.setdefault(-1 - index if ranking is None else ranking, []).append(index)
    return list(groups.values())
