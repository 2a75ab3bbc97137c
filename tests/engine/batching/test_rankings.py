"""More than two answers: each is computed once, and a ranking is never cut."""

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_dpo_engine.batching.packing import pack
from fused_dpo_engine.batching.padding import pad
from fused_dpo_engine.batching.planning import build_batch, check_rankings, plan_pairs, share_units
from fused_dpo_engine.batching.schedule import Schedule
from fused_dpo_engine.batching.sharing import place_sequences
from fused_dpo_engine.config.options import PackingOptions, RunOptions
from fused_dpo_engine.data.pairs import TokenPair, ranking_groups, split_pairs
from fused_dpo_engine.errors import UserError
from tests.engine.support.rankings import SHAPES, ranked_pairs_of
from tests.engine.support.toys import any_pairs, make_pairs

LAYOUTS: list[dict[str, Any]] = [{}, {"prefix_sharing": False}, {"packing": False}]


def tokens_of(shapes: list[tuple[int, tuple[int, ...]]]) -> int:
    """Tokens of every prompt once and every answer once."""
    return sum(prompt + sum(lengths) for prompt, lengths in shapes)


def cut(pairs: list[TokenPair], parts: list[list[int]]) -> list[int]:
    """Rankings of which not all pairs are in one part."""
    places = defaultdict(set)
    for part, indices in enumerate(parts):
        for index in indices:
            places[pairs[index].ranking].add(part)
    return [ranking for ranking, seen in places.items() if ranking is not None and len(seen) > 1]


class TestEveryAnswerOnce:
    @pytest.mark.parametrize("pairing", ["best", "all"])
    def test_backbone_and_head_compute_every_answer_once(self, pairing):
        pairs = ranked_pairs_of(pairing=pairing)
        batch = pack(pairs, range(len(pairs)))
        assert len(pairs) == (12 if pairing == "best" else 23)
        assert batch.num_slots == tokens_of(SHAPES)
        call = batch.head_call(torch.zeros(1, batch.num_slots, 3))
        assert len(call.labels) == len(call.hidden_states) == sum(sum(lengths) for _, lengths in SHAPES)
        assert call.settings["cu_seqlens"].diff().tolist() == [
            len(placement.ids) - pairs[placement.sequence // 2].prompt_length
            for placement in sorted(place_sequences(pairs, range(len(pairs)), share=True))
        ]
        # Negative control: without sharing every pair has its own.
        alone = pack(pairs, range(len(pairs)), share=False)
        assert alone.num_slots == alone.num_tokens == batch.num_tokens == sum(pair.num_tokens for pair in pairs)
        assert alone.copies is None
        assert len(alone.head_call(torch.zeros(1, alone.num_slots, 3)).labels) == len(alone.targets)

    def test_every_token_gets_its_own_value(self):
        """Whatever the head answers, a scored token gets the answer to the row and target that are its own."""
        pairs = ranked_pairs_of(pairing="all")
        batch = pack(pairs, [*range(12), *range(22, 11, -1)])
        rows = torch.arange(batch.num_slots, dtype=torch.float64)[None, :, None]
        call = batch.head_call(rows)
        assert batch.spread(call.hidden_states[:, 0]).tolist() == batch.scored_rows.tolist()
        assert batch.spread(call.labels.double()).tolist() == batch.targets.tolist()
        assert len(batch.targets) == int(batch.offsets[-1]) == sum(batch.scored_lengths)

    @settings(deadline=None)
    @given(pairs=any_pairs(), order=st.randoms(use_true_random=False))
    def test_also_where_answers_of_several_rows_are_equal(self, pairs, order):
        indices = order.sample(range(len(pairs)), order.randint(1, len(pairs)))
        batch = pack(pairs, indices)
        call = batch.head_call(torch.arange(batch.num_slots, dtype=torch.float64)[None, :, None])
        assert batch.spread(call.hidden_states[:, 0]).tolist() == batch.scored_rows.tolist()
        assert batch.spread(call.labels.double()).tolist() == batch.targets.tolist()
        different = {(pairs[i].prompt_key, key) for i in indices for key in pairs[i].keys}
        assert len(batch.attention.segments) == len(different)

    def test_gradients_of_copies_add_up(self):
        pairs = ranked_pairs_of([(3, (2, 1, 2))])
        batch = pack(pairs, [0, 1])
        values = torch.arange(5.0, requires_grad=True)  # best: 0 and 1, then 2, then 3 and 4
        spread = batch.spread(values)
        assert spread.tolist() == [0, 1, 2, 0, 1, 3, 4]
        (grad,) = torch.autograd.grad(spread @ torch.tensor([1.0, 2, 3, 10, 20, 4, 5]), values)
        assert grad.tolist() == [11, 22, 3, 4, 5]

    def test_copies_move_with_the_batch(self):
        batch = pack(ranked_pairs_of(), [0, 1])
        assert batch.copies is not None
        away = batch.to(torch.device("meta")).copies
        assert away is not None
        assert all(tensor.is_meta for tensor in away)
        back = batch.to(torch.device("cpu")).copies
        assert back is not None
        assert all(torch.equal(*both) for both in zip(back, batch.copies, strict=True))

    def test_units_cost_what_they_take(self):
        pairs = ranked_pairs_of(pairing="all", together=False)
        units, costs = share_units(pairs, range(len(pairs)), 1000)
        assert len(units) == len(SHAPES)
        assert costs == [tokens_of([shape]) for shape in SHAPES]

    @pytest.mark.parametrize("build", [pack, pad])
    def test_margins_and_rankings(self, build):
        pairs = [*ranked_pairs_of([(3, (2, 1, 2))]), *make_pairs((2, 1, 1), (2, 1, 1))]
        batch = build(pairs, [3, 1, 0, 2])
        assert batch.margins.tolist() == [0.0, 1.0, 0.5, 0.0]
        assert batch.margins.dtype == torch.float32
        numbers = batch.rankings.tolist()
        assert numbers[1] == numbers[2]
        assert len(set(numbers)) == 3


class TestRankingsStayWhole:
    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    @pytest.mark.parametrize("together", [True, False])
    def test_in_forward_passes(self, layout, together):
        whole = ranked_pairs_of()
        pairs = whole if together else [dataclasses.replace(pair, ranking=None) for pair in whole]
        budget = 110 if layout else 40
        plan = plan_pairs(pairs, range(len(pairs)), PackingOptions(tokens_per_batch=budget, **layout))
        assert sorted(i for planned in plan for i in planned.indices) == list(range(len(pairs)))
        for planned in plan:
            assert build_batch(pairs, planned.indices, PackingOptions(**layout)).num_slots <= planned.slots <= budget
        split = cut(whole, [planned.indices for planned in plan])
        if together:
            assert split == []
            assert len(plan) > 1
        elif layout:  # control: nothing else would keep them together; with sharing, prompts that fit are not cut
            assert split

    def test_a_prompt_is_cut_between_rankings_alone(self):
        """Two rows on one prompt that do not fit into a pass together."""
        shapes = [(10, (3, 3, 3)), (10, (3, 3, 3))]
        pairs = ranked_pairs_of(shapes)
        prompt = pairs[0].chosen_ids[:10]
        pairs[2:] = [
            dataclasses.replace(
                pair,
                chosen_ids=np.concatenate((prompt, pair.chosen_ids[10:])),
                rejected_ids=np.concatenate((prompt, pair.rejected_ids[10:])),
            )
            for pair in pairs[2:]
        ]
        together, costs = share_units(pairs, range(4), 28)
        assert (together, costs) == ([[0, 1, 2, 3]], [28])
        apart, costs = share_units(pairs, range(4), 27)
        assert (apart, costs) == ([[0, 1], [2, 3]], [19, 19])
        single = [dataclasses.replace(pair, ranking=None) for pair in pairs]
        assert share_units(single, range(4), 27)[0] == [[0, 1, 2], [3]]  # control

    def run(self, pairs: list[TokenPair], **packing: Any) -> Schedule:
        run = RunOptions(output="", pairs_per_step=4, epochs=3)
        return Schedule(pairs, run, PackingOptions(tokens_per_batch=110, **packing))

    @pytest.mark.parametrize("packing", [*LAYOUTS, {"batches_per_step": 1, "plan_window": 4}], ids=str)
    def test_in_steps(self, packing):
        pairs = ranked_pairs_of(SHAPES * 3)
        schedule = self.run(pairs, **packing)
        steps = list(schedule)
        assert len(steps) == schedule.total_steps
        whole = [*range(len(pairs))]
        assert sorted(index for step in steps for index in step.indices) == sorted(whole * 3)
        assert all(cut(pairs, [step.indices]) == [] for step in steps)
        for step in steps:
            for group in ranking_groups(pairs, step.indices):
                number = int(pairs[group[0]].where.partition(":")[2]) - 1
                assert len(group) == len(SHAPES[number % len(SHAPES)][1]) - 1
        for step in steps:
            assert cut(pairs, [planned.indices for planned in step.batches]) == []
            if "batches_per_step" not in packing:
                assert len(step.indices) < 4 + 4  # the rest of the longest ranking

    def test_control_without_rankings_steps_have_their_size(self):
        pairs = ranked_pairs_of(SHAPES * 3, together=False)
        steps = list(self.run(pairs))
        assert {len(step.indices) for step in steps} == {4}
        numbered = ranked_pairs_of(SHAPES * 3)
        assert cut(numbered, [step.indices for step in steps[: len(steps) // 3]])

    def test_between_ranks(self):
        pairs = ranked_pairs_of(SHAPES * 4)
        run, packing = RunOptions(output="", pairs_per_step=12), PackingOptions(tokens_per_batch=200)
        ranks = [list(Schedule(pairs, run, packing, num_ranks=3, rank=rank).first_pass()) for rank in range(3)]
        for steps in zip(*ranks, strict=True):
            assert len({len(step.batches) for step in steps}) == 1
            parts = [planned.indices for step in steps for planned in step.batches]
            assert sorted(i for part in parts for i in part) == sorted(steps[0].indices)
            assert cut(pairs, parts) == []

    def test_held_out_pairs_keep_a_row_on_one_side(self):
        train, held_out = split_pairs(ranked_pairs_of(SHAPES * 4), 0.3, seed=1)
        assert {pair.where for pair in train} & {pair.where for pair in held_out} == set()
        assert held_out


class TestTooLarge:
    @pytest.mark.parametrize(
        ("layout", "slots"), [({}, 27), ({"prefix_sharing": False}, 94), ({"packing": False}, 104)]
    )
    def test_names_the_row_and_the_way_out(self, layout, slots):
        pairs = ranked_pairs_of()
        check_rankings(pairs, PackingOptions(tokens_per_batch=slots, **layout))
        message = rf"pairs\.jsonl:3: its 5 answers are ranked together and take {slots} tokens, more than tokens-per"
        with pytest.raises(UserError, match=message):
            check_rankings(pairs, PackingOptions(tokens_per_batch=slots - 1, **layout))

    def test_pairs_alone_may_be_spread(self):
        check_rankings(ranked_pairs_of(together=False), PackingOptions(tokens_per_batch=20))
