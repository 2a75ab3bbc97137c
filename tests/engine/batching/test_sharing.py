"""What sequences have in common, and how they are laid out in a row because of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_dpo_engine.batching.sharing import place_sequences, shared_length
from fused_dpo_engine.data.pairs import TokenPair, common_prefix, prompt_groups
from tests.engine.support.toys import make_pair, make_pairs

tokens = st.lists(st.integers(0, 1), max_size=6)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenPair:
    return TokenPair(len(prompt), ids(*prompt, *chosen), ids(*prompt, *rejected), "x:1")


@given(a=tokens, b=tokens)
def test_common_prefix(a, b):
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_prefix(ids(*a), ids(*b)) == expected


@pytest.mark.parametrize(
    ("trunk", "branch", "expected"),
    [
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2, 3], [1, 2, 3, 4], 3),  # extends the trunk
        ([1, 2, 3, 4], [1, 2, 3], 2),  # the trunk extends it: one token is left over
        ([1, 2], [1, 2], 1),
        ([1], [2, 1], 0),
        ([1], [1], 0),
    ],
)
def test_shared_length_leaves_a_token(trunk, branch, expected):
    assert shared_length(ids(*trunk), ids(*branch)) == expected


def test_groups_are_by_the_tokens_of_the_prompt():
    pairs = [pair([1], [2], [3]), pair([1, 2], [4], [5]), pair([1], [6], [7]), pair([1, 2], [3], [4])]
    assert prompt_groups(pairs, [3, 2, 1, 0]) == [[3, 1], [2, 0]]


class TestPlacement:
    def test_a_pair(self):
        placements = place_sequences([pair([1, 2], [3, 4], [3, 5, 6])], [0], share=True)
        assert [(p.sequence, p.trunk, p.shared, p.num_rows) for p in placements] == [(0, 0, 0, 4), (1, 0, 3, 2)]

    def test_several_pairs_on_a_prompt_share_it_once(self):
        pairs = [pair([1, 2], [3], [4]), make_pair(3, 2, 2), pair([1, 2], [5, 6], [3, 7])]
        placements = place_sequences(pairs, [0, 1, 2], share=True)
        assert [p.sequence for p in placements] == [0, 1, 4, 5, 2, 3]
        assert [p.trunk for p in placements] == [0, 0, 0, 0, 4, 4]
        assert [p.shared for p in placements] == [0, 2, 2, 3, 0, 3]
        assert sum(p.num_rows for p in placements) == 2 + 1 + 1 + 2 + 1 + 3 + 2 + 2

    def test_without_sharing_every_sequence_is_whole_and_in_order(self):
        pairs = [pair([1, 2], [3], [4]), pair([1, 2], [5, 6], [3, 7])]
        placements = place_sequences(pairs, [1, 0], share=False)
        assert [(p.sequence, p.trunk, p.shared) for p in placements] == [(i, i, 0) for i in range(4)]
        assert [p.ids.tolist() for p in placements] == [[1, 2, 5, 6], [1, 2, 3, 7], [1, 2, 3], [1, 2, 4]]

    def test_nothing_in_common_makes_a_trunk_of_its_own(self):
        """As where a tokenizer merges the prompt's only token differently."""
        odd = TokenPair(1, ids(1, 2), ids(3, 2), "x:1")
        assert [(p.trunk, p.shared) for p in place_sequences([odd], [0], share=True)] == [(0, 0), (1, 0)]

    @settings(deadline=None)
    @given(count=st.integers(1, 6))
    def test_pairs_on_different_prompts_share_within_the_pair_alone(self, count):
        pairs = make_pairs(*[(4, 3, 2)] * count)
        placements = place_sequences(pairs, range(count), share=True)
        assert sum(p.num_rows for p in placements) == count * (4 + 3 + 2)
