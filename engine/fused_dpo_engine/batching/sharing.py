"""What the sequences on one prompt have in common: computed once, and seen by all of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fused_dpo_engine.data.pairs import TokenPair, common_prefix, prompt_groups


class Placement(NamedTuple):
    """One sequence of a packed row: the first `shared` of its tokens are those of its trunk, the rest is laid down."""

    sequence: int
    """2 x position of its pair, + 1 for the rejected side."""
    ids: np.ndarray
    """int32, all its tokens."""
    trunk: int
    """Place of the sequence it shares its beginning with; its own place if it shares none."""
    shared: int
    """Tokens it has in common with the trunk, at most all but one: 0 for a trunk."""
    copies: tuple[int, ...] = ()
    """Sequences of other pairs, numbered as this one, that are the same tokens: the row holds them once."""

    @property
    def num_rows(self) -> int:
        """Tokens it adds to the packed row."""
        return len(self.ids) - self.shared


def shared_length(trunk: np.ndarray, ids: np.ndarray) -> int:
    """Count the tokens of `ids` that need not be computed beside `trunk`: their common prefix, less the last of all.

    What is left has to hold at least one row, as an attention segment without queries is none.
    """
    return min(common_prefix(trunk, ids), len(ids) - 1)


def place_sequences(pairs: Sequence[TokenPair], indices: Sequence[int], *, share: bool) -> list[Placement]:
    """Lay out both sequences of `pairs[i] for i in indices` in one row, without gaps.

    With `share`, pairs on the same prompt form one group, `[prompt + r1 | r2 | r3 ...]`: the first pair's chosen
    sequence is the trunk, and every other sequence begins where it parts from it, be that in the middle of a response.
    A response that several of them have, as the best of several answers, stands there once. Without `share` every
    sequence stands there in full.

    Returns:
        The sequences in the order of the row.
    """
    position = {index: place for place, index in enumerate(indices)}
    placements: list[Placement] = []
    for group in prompt_groups(pairs, indices) if share else [list(indices)]:
        trunk = len(placements)
        places: dict[bytes, int] = {}
        for index in group:
            pair = pairs[index]
            for side, (ids, key) in enumerate(zip((pair.chosen_ids, pair.rejected_ids), pair.keys, strict=True)):
                here, sequence = len(placements), 2 * position[index] + side
                same = places.setdefault(key, here) if share else here
                if same != here:
                    placements[same] = placements[same]._replace(copies=(*placements[same].copies, sequence))
                    continue
                shared = shared_length(placements[trunk].ids, ids) if share and here > trunk else 0
                placements.append(Placement(sequence, ids, trunk if shared else here, shared))
    return placements
