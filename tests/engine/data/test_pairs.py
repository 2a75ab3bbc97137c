"""The split into training and held-out pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fused_dpo_engine.data.pairs import TokenPair, split_pairs
from fused_dpo_engine.errors import DataError


class TestSplit:
    def pairs(self, prompts):
        return [
            TokenPair(len(prompt), np.array([*prompt, 1], np.int32), np.array([*prompt, 2], np.int32), str(index))
            for index, prompt in enumerate(prompts)
        ]

    def test_both_sides_together_are_all_pairs_in_order(self):
        pairs = self.pairs([[number, 7] for number in range(100)])
        train, held_out = split_pairs(pairs, 0.1, seed=3)
        assert (len(train), len(held_out)) == (90, 10)
        assert sorted([*train, *held_out], key=pairs.index) == pairs
        assert train == sorted(train, key=pairs.index)

    def test_the_seed_and_the_tokens_alone_decide(self):
        pairs = self.pairs([[number, 7] for number in range(100)])
        _, first = split_pairs(pairs, 0.1, seed=0)
        _, again = split_pairs(pairs[::-1], 0.1, seed=0)
        _, other = split_pairs(pairs, 0.1, seed=-1)
        assert set(first) == set(again)
        assert set(first) != set(other)
        assert [pair.where for pair in first] == ["0", "2", "3", "4", "27", "40", "70", "73", "95", "96"]

    @given(
        st.lists(st.integers(0, 5), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(-(2**63), 2**63 - 1)
    )
    def test_no_prompt_is_on_both_sides(self, prompts, fraction, seed):
        pairs = self.pairs([[prompt] for prompt in prompts])
        if len(set(prompts)) < 2:
            with pytest.raises(
                DataError, match=r"needs at least two different prompts, got 1 in \d+ pairs; give a sepa"
            ):
                split_pairs(pairs, fraction, seed)
            return
        train, held_out = split_pairs(pairs, fraction, seed)
        assert len(train) + len(held_out) == len(pairs)
        assert train
        assert held_out
        assert not {pair.chosen_ids[0] for pair in train} & {pair.chosen_ids[0] for pair in held_out}

    @pytest.mark.parametrize("fraction", [0, 1, -0.5, 2.0, float("nan")])
    def test_fraction(self, fraction):
        with pytest.raises(DataError, match="held-out fraction must be between 0 and 1, got"):
            split_pairs(self.pairs([[1], [2]]), fraction, 0)
