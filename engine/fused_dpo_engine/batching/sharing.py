"""What the sequences on one prompt have in common: computed once, and seen by all of them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fused_dpo_engine.attention.plan import Segment
from fused_dpo_engine.data.pairs import TokenPair, common_prefix, prompt_groups


class Member(NamedTuple):
    """A sequence of a group that shares its beginning."""

    sequence: int
    """Its number."""
    ids: np.ndarray
    """int32, all its tokens, at least one."""
    key: bytes
    """Equal for sequences of a group that are the same in every way: tokens, and which of them are scored."""


class Placement(NamedTuple):
    """One sequence of a packed row: the first `shared` of its tokens are those of its trunk, the rest is laid down."""

    sequence: int
    """Its number; of pairs 2 x position of the pair, + 1 for the rejected side."""
    ids: np.ndarray
    """int32, all its tokens."""
    trunk: int
    """Place of the sequence it shares its beginning with; its own place if it shares none."""
    shared: int
    """Tokens it has in common with the trunk, at most all but one: 0 for a trunk."""
    copies: tuple[int, ...] = ()
    """Numbers of further sequences that are the same tokens: the row holds them once."""

    @property
    def num_rows(self) -> int:
        """Tokens it adds to the packed row."""
        return len(self.ids) - self.shared


def shared_length(trunk: np.ndarray, ids: np.ndarray) -> int:
    """Count the tokens of `ids` that need not be computed beside `trunk`: their common prefix, less the last of all.

    What is left has to hold at least one row, as an attention segment without queries is none.
    """
    return min(common_prefix(trunk, ids), len(ids) - 1)


def place_groups(groups: Iterable[Sequence[Member]]) -> list[Placement]:
    """Lay out sequences in one row without gaps, the first of each group as the trunk of the others.

    Every other member begins where it parts from the trunk, be that in the middle of a response. Members with the same
    key stand there once.

    Returns:
        The sequences in the order of the row.
    """
    placements: list[Placement] = []
    for group in groups:
        trunk = len(placements)
        places: dict[bytes, int] = {}
        for sequence, ids, key in group:
            here = len(placements)
            same = places.setdefault(key, here)
            if same != here:
                placements[same] = placements[same]._replace(copies=(*placements[same].copies, sequence))
                continue
            shared = shared_length(placements[trunk].ids, ids) if here > trunk else 0
            placements.append(Placement(sequence, ids, trunk if shared else here, shared))
    return placements


def place_sequences(pairs: Sequence[TokenPair], indices: Sequence[int], *, share: bool) -> list[Placement]:
    """Lay out both sequences of `pairs[i] for i in indices` in one row.

    With `share`, pairs on the same prompt form one group, `[prompt + r1 | r2 | r3 ...]`: the first pair's chosen
    sequence is the trunk, and a response that several of them have, as the best of several answers, stands there once.
    Without `share` every sequence stands there in full.

    Returns:
        The sequences in the order of the row.
    """
    members = [
        [
            Member(2 * place + side, ids, key)
            for side, (ids, key) in enumerate(
                zip((pairs[index].chosen_ids, pairs[index].rejected_ids), pairs[index].keys, strict=True)
            )
        ]
        for place, index in enumerate(indices)
    ]
    if not share:
        return place_groups([member] for both in members for member in both)
    position = {index: place for place, index in enumerate(indices)}
    return place_groups(
        [member for index in group for member in members[position[index]]] for group in prompt_groups(pairs, indices)
    )


def rows_of(placements: Sequence[Placement]) -> tuple[list[Segment], list[np.ndarray]]:
    """Tell what each sequence of a packed row is to its attention, and the row of each of its tokens.

    A token stands in the trunk as far as its sequence goes together with it, then among the sequence's own rows.

    Returns:
        (segments, rows): of each placement, the rows int64 [length of the sequence].
    """
    segments: list[Segment] = []
    rows: list[np.ndarray] = []
    stop = 0
    for placement in placements:
        start, stop = stop, stop + placement.num_rows
        segments.append(Segment(start, stop, placement.trunk, placement.shared))
        trunk = segments[placement.trunk].start
        rows.append(np.concatenate((np.arange(trunk, trunk + placement.shared), np.arange(start, stop))))
    return segments, rows
