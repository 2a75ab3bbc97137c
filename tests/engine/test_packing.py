"""Planning and packing: nothing lost, nothing split, every index where slow code puts it."""

import dataclasses
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_dpo_engine.packing import AttentionPlan, pack, pack_all, pair_cost, plan_batches
from fused_dpo_engine.pairs import TokenPair
from tests.engine.helpers import make_pair, make_pairs

lengths = st.integers(1, 12)
shapes = st.lists(st.tuples(lengths, lengths, lengths), min_size=1, max_size=8)


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


class TestPlan:
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


def slow_pack(pairs: list[TokenPair]) -> dict[str, list]:
    """The same, a token at a time."""
    expected: dict[str, list] = defaultdict(list, cu_scored=[0])
    for pair in pairs:
        for side in ("chosen", "rejected"):
            start = len(expected["input_ids"])
            before = len(expected["targets"])
            for position, token in enumerate(getattr(pair, f"{side}_ids").tolist()):
                if position >= pair.prompt_length:
                    expected["scored_rows"].append(start + position - 1)
                    expected["targets"].append(token)
                expected["input_ids"].append(token)
                expected["position_ids"].append(position)
            expected["segments"].append((start, len(expected["input_ids"])))
            expected["cu_scored"].append(len(expected["targets"]))
            expected[f"{side}_lengths"].append(len(expected["targets"]) - before)
    return expected


class TestPack:
    @settings(deadline=None)
    @given(shapes=shapes, order=st.randoms(use_true_random=False))
    def test_against_slow_construction(self, shapes, order):
        pairs = make_pairs(*shapes)
        indices = order.sample(range(len(pairs)), order.randint(1, len(pairs)))
        batch = pack(pairs, indices)
        expected = slow_pack([pairs[i] for i in indices])
        assert batch.pair_indices == indices
        assert batch.num_pairs == len(indices)
        assert batch.num_tokens == len(expected["input_ids"])
        assert list(batch.attention.segments) == expected.pop("segments")
        for name, values in expected.items():
            tensor = getattr(batch, name)
            shape = [1, len(values)] if name in ("input_ids", "position_ids") else [len(values)]
            assert list(tensor.shape) == shape
            assert tensor.dtype == (torch.int32 if name == "cu_scored" else torch.int64)
            assert tensor.flatten().tolist() == values, name

    def test_by_hand(self):
        pair = TokenPair(2, np.array([7, 8, 9], np.int32), np.array([7, 8, 5, 6], np.int32), "x:1")
        batch = pack([pair], [0])
        assert batch.input_ids.tolist() == [[7, 8, 9, 7, 8, 5, 6]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
        assert batch.scored_rows.tolist() == [1, 4, 5]  # the row of token 8 predicts 9, and 5 in the other sequence
        assert batch.targets.tolist() == [9, 5, 6]
        assert batch.cu_scored.tolist() == [0, 1, 3]
        assert batch.attention == AttentionPlan(((0, 3), (3, 7)))

    @settings(deadline=None)
    @given(shapes=shapes, extra=st.integers(0, 60))
    def test_pack_all_splits_no_pair(self, shapes, extra):
        pairs = make_pairs(*shapes)
        budget = max(map(pair_cost, pairs)) + extra
        indices = list(range(len(pairs)))[::-1]
        batches = pack_all(pairs, indices, budget)
        assert sorted(i for batch in batches for i in batch.pair_indices) == sorted(indices)
        assert all(batch.num_tokens <= budget for batch in batches)
        for batch in batches:
            assert len(batch.attention.segments) == 2 * batch.num_pairs == len(batch.cu_scored) - 1
            assert batch.num_tokens == sum(pair_cost(pairs[i]) for i in batch.pair_indices)

    def test_pack_all_names_the_way_out(self):
        with pytest.raises(ValueError, match="tokens_per_batch"):
            pack_all([make_pair(5, 5, 5)], [0], 19)

    def test_to_moves_every_tensor_and_keeps_the_rest(self):
        batch = pack(make_pairs((3, 2, 4), (1, 1, 1)), [1, 0])
        away, back = batch.to(torch.device("meta")), batch.to(torch.device("cpu"))
        for field in dataclasses.fields(batch):
            value = getattr(batch, field.name)
            if isinstance(value, Tensor):
                assert getattr(away, field.name).is_meta, field.name
                assert torch.equal(getattr(back, field.name), value)
            else:
                assert getattr(away, field.name) == value
