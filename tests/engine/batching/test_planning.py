"""Plans of forward passes: no pair lost or split, no pass too large, few passes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_dpo_engine.batching.planning import build_batch, count_slots, plan_batches, plan_pairs, share_units
from fused_dpo_engine.config.options import PackingOptions
from fused_dpo_engine.data.pairs import TokenPair
from tests.engine.support.toys import any_pairs, make_pair, make_pairs

LAYOUTS = [{}, {"prefix_sharing": False}, {"packing": False}]


def first_fit(costs: list[int], budget: int) -> int:
    """Batches that the simplest planner takes."""
    batches: list[int] = []
    for cost in costs:
        for i, used in enumerate(batches):
            if used + cost <= budget:
                batches[i] += cost
                break
        else:
            batches.append(cost)
    return len(batches)


class TestBestFit:
    @settings(deadline=None)
    @given(costs=st.lists(st.integers(1, 50), max_size=60), budget=st.integers(50, 200))
    def test_properties(self, costs, budget):
        plan = plan_batches(costs, budget)
        assert sorted(item for batch in plan for item in batch) == list(range(len(costs)))
        assert plan == plan_batches(costs, budget)
        assert all(batch == sorted(batch) for batch in plan)
        used = [sum(costs[item] for item in batch) for batch in plan]
        assert all(0 < tokens <= budget for tokens in used)
        largest = [max(costs[item] for item in batch) for batch in plan]
        assert largest == sorted(largest, reverse=True)
        # No two batches would go into one, and so at most one is half empty.
        assert sum(sorted(used)[:2]) > budget or len(plan) < 2
        # The known bound of best-fit-decreasing on the least number of batches, which first-fit cannot beat.
        assert len(plan) <= 11 / 9 * first_fit(costs, budget) + 1

    def test_ties_go_to_the_earlier_item(self):
        assert plan_batches([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]

    def test_the_tightest_batch_is_taken(self):
        # 3 goes to the batch with 3 left, not to the earlier one with 4 left, which leaves room for 4.
        assert plan_batches([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]

    def test_one_item_may_fill_the_budget(self):
        assert plan_batches([10], 10) == [[0]]

    def test_too_large_an_item(self):
        with pytest.raises(ValueError, match=r"11 tokens does not fit into a batch of 10; raise tokens_per_batch"):
            plan_batches([3, 11], 10)


class TestUnits:
    def pairs_on_one_prompt(self, count: int) -> list[TokenPair]:
        prompt = np.arange(10, dtype=np.int32)
        return [
            TokenPair(10, np.append(prompt, [20 + i, 1]), np.append(prompt, [40 + i, 2, 3]), "x") for i in range(count)
        ]

    def test_pairs_on_a_prompt_stay_together(self):
        pairs = [*self.pairs_on_one_prompt(3), make_pair(2, 1, 1)]
        units, costs = share_units(pairs, [0, 3, 1, 2], 100)
        assert units == [[0, 1, 2], [3]]
        assert costs == [10 + 3 * (2 + 3), 4]

    def test_a_prompt_with_more_pairs_than_fit_is_cut(self):
        units, costs = share_units(self.pairs_on_one_prompt(5), range(5), 22)
        assert units == [[0, 1], [2, 3], [4]]
        assert costs == [20, 20, 15]


class TestPlan:
    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    @settings(deadline=None)
    @given(pairs=any_pairs(), extra=st.integers(0, 40))
    def test_properties(self, layout, pairs, extra):
        largest = max(2 * max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
        options = PackingOptions(tokens_per_batch=max(4, largest + extra), **layout)
        indices = list(range(len(pairs)))[::-1]
        plan = plan_pairs(pairs, indices, options)
        assert sorted(i for planned in plan for i in planned.indices) == sorted(indices)
        assert plan == plan_pairs(pairs, indices, options)
        for planned in plan:
            batch = build_batch(pairs, planned.indices, options)
            # Two units of one prompt may meet in a pass, which then takes less than planned.
            assert batch.num_slots == count_slots(pairs, planned.indices, options) <= planned.slots
            assert planned.slots <= options.tokens_per_batch

    def test_sharing_takes_fewer_passes(self):
        pairs = make_pairs(*[(30, 5, 5)] * 8)
        passes = [len(plan_pairs(pairs, range(8), PackingOptions(tokens_per_batch=80, **layout))) for layout in LAYOUTS]
        assert passes == [4, 8, 8]

    def test_padded_batches_are_in_order(self):
        pairs = make_pairs((2, 2, 2), (2, 8, 1), (2, 2, 2), (2, 3, 2))
        plan = plan_pairs(pairs, [0, 1, 2, 3], PackingOptions(tokens_per_batch=24, packing=False))
        assert [(planned.indices, planned.slots) for planned in plan] == [([0], 8), ([1], 20), ([2, 3], 20)]

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_too_large_a_pair_names_the_way_out(self, layout):
        with pytest.raises(ValueError, match=r"does not fit into a batch of 14; raise tokens_per_batch"):
            plan_pairs([make_pair(5, 5, 5)], [0], PackingOptions(tokens_per_batch=14, **layout))
