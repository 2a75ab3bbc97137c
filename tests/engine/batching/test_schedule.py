"""Steps of a run: every pair once an epoch, the same for the same seed, as many forward passes on every rank."""

import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fused_dpo_engine.batching.schedule import Schedule
from fused_dpo_engine.cli import parse
from fused_dpo_engine.config.options import PackingOptions, RunOptions
from fused_dpo_engine.data.pairs import TokenPair
from tests.engine.support.toys import make_pairs, options


def schedule(pairs: list[TokenPair], *, num_ranks: int = 1, rank: int = 0, **settings: Any) -> Schedule:
    """With options by name."""
    config = parse("train", options(model="m", data="d", output="o", max_length=2, **settings))
    return Schedule(pairs, config.run, config.packing, num_ranks=num_ranks, rank=rank)


def many_pairs(count: int, *, prompts: int | None = None, seed: int = 0) -> list[TokenPair]:
    """Pairs with lengths as real ones have, several on a prompt if there are fewer prompts."""
    random = np.random.default_rng(seed)
    prompt_lengths = random.lognormal(4.9, 0.8, prompts or count).astype(int) + 1
    starts = [random.integers(0, 50_000, length).astype(np.int32) for length in prompt_lengths.tolist()]
    lengths = random.lognormal(4.0, 0.8, (count, 2)).astype(int) + 1
    pairs = []
    for index, (chosen, rejected) in enumerate(lengths.tolist()):
        start, response = starts[index % len(starts)], random.integers(0, 50_000, chosen + rejected).astype(np.int32)
        sides = np.concatenate((start, response[:chosen])), np.concatenate((start, response[chosen:]))
        pairs.append(TokenPair(len(start), *sides, f"x:{index}"))
    return pairs


class TestStepsOfPairs:
    PAIRS = make_pairs(*[(2, 1, 1)] * 10)

    def test_every_epoch_sees_every_pair_once_in_a_new_order(self):
        def indices(**settings: Any) -> list[list[int]]:
            return [step.indices for step in schedule(self.PAIRS, pairs_per_step=4, **settings)]

        steps = indices(seed=3, max_steps=9)
        assert [len(step) for step in steps] == [4, 4, 2] * 3
        epochs = [[pair for step in steps[i : i + 3] for pair in step] for i in (0, 3, 6)]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        assert all(a != b for a, b in pairwise(epochs))
        assert steps == indices(seed=3, max_steps=9)
        assert steps[:5] == indices(seed=3, max_steps=5)
        assert steps != indices(seed=4, max_steps=9)

    def test_the_layout_does_not_change_the_steps(self):
        pairs = many_pairs(40, prompts=15)
        steps = [
            [step.indices for step in schedule(pairs, epochs=2, **layout)]
            for layout in ({}, {"prefix_sharing": False}, {"packing": False}, {"tokens_per_batch": 20000})
        ]
        assert all(other == steps[0] for other in steps)

    def test_pairs_on_a_prompt_follow_each_other(self):
        pairs = many_pairs(40, prompts=10)
        (step,) = list(schedule(pairs, pairs_per_step=40).first_pass())
        assert step.indices != list(range(40))
        assert [step.indices[i] % 10 for i in range(40)] == [step.indices[4 * (i // 4)] % 10 for i in range(40)]

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [({}, 3), ({"epochs": 2}, 6), ({"epochs": 1.5}, 5), ({"epochs": 0.01}, 1), ({"epochs": 9, "max_steps": 7}, 7)],
    )
    def test_total(self, settings, expected):
        steps = schedule(self.PAIRS, pairs_per_step=4, **settings)
        assert steps.total_steps == expected == len(list(steps))
        assert len(list(steps.first_pass())) == min(expected, 3)

    def test_ranks_share_every_step(self):
        pairs = many_pairs(64)
        ranks = [
            list(schedule(pairs, pairs_per_step=24, tokens_per_batch=2000, num_ranks=3, rank=rank)) for rank in range(3)
        ]
        for steps in zip(*ranks, strict=True):
            assert len({len(step.batches) for step in steps}) == 1
            assert all(step.indices == steps[0].indices for step in steps)
            seen = [index for step in steps for planned in step.batches for index in planned.indices]
            assert sorted(seen) == sorted(steps[0].indices)

    def test_too_few_pairs_for_the_ranks(self):
        """The last ranks take part in a pass that another has, and that is not counted."""
        ranks = [list(schedule(self.PAIRS, pairs_per_step=4, num_ranks=3, rank=rank)) for rank in range(3)]
        for steps in zip(*ranks, strict=True):
            assert len({len(step.batches) for step in steps}) == 1
            passes = [planned for step in steps for planned in step.batches]
            counted = [index for planned in passes if planned.counted for index in planned.indices]
            assert sorted(counted) == sorted(steps[0].indices)
            assert {step.rows for step in steps} == {sum(planned.slots for planned in passes if planned.counted)}
        last = [step.batches for step in (steps[-1] for steps in ranks)]
        assert [[planned.counted for planned in batches] for batches in last] == [[True], [True], [False]]
        assert last[2][0].indices in (last[0][0].indices, last[1][0].indices)

    def test_control_enough_pairs_repeat_nothing(self):
        steps = [step for rank in range(2) for step in schedule(self.PAIRS, pairs_per_step=4, num_ranks=2, rank=rank)]
        assert all(planned.counted for step in steps for planned in step.batches)

    @pytest.mark.parametrize("packing", [True, False])
    def test_rows_of_a_step_hold_tokens(self, packing):
        pairs = many_pairs(20)
        for step in schedule(pairs, packing=packing, prefix_sharing=False):
            assert step.rows == sum(pairs[index].num_tokens for index in step.indices)

    def test_other_pairs_are_shared_alike(self):
        pairs = many_pairs(33, seed=1)
        shares = [schedule(self.PAIRS, num_ranks=4, rank=rank).plan_share(pairs) for rank in range(4)]
        assert len({len(share) for share in shares}) == 1
        counted = [index for share in shares for planned in share if planned.counted for index in planned.indices]
        assert sorted(counted) == list(range(33))


class TestStepsOfFullPasses:
    def test_too_few_pairs_for_the_ranks(self):
        pairs = make_pairs(*[(2, 1, 1)] * 3)
        ranks = [list(schedule(pairs, batches_per_step=1, num_ranks=8, rank=rank)) for rank in range(8)]
        assert [len(steps) for steps in ranks] == [1] * 8
        assert all(sorted(steps[0].indices) == [0, 1, 2] for steps in ranks)
        assert sum(steps[0].batches[0].counted for steps in ranks) == 3

    @pytest.mark.parametrize("num_ranks", [1, 2, 8])
    @pytest.mark.parametrize("batches_per_step", [1, 3])
    def test_every_pair_once_and_equal_numbers(self, num_ranks, batches_per_step):
        pairs = many_pairs(1500, prompts=1200)
        settings = {"batches_per_step": batches_per_step, "plan_window": 400}
        ranks = [
            list(schedule(pairs, num_ranks=num_ranks, rank=rank, **settings).first_pass()) for rank in range(num_ranks)
        ]
        seen = []
        for steps in zip(*ranks, strict=True):
            assert len({len(step.batches) for step in steps}) == 1
            assert all(step.indices == steps[0].indices for step in steps)
            here = [index for step in steps for planned in step.batches for index in planned.indices]
            assert sorted(here) == sorted(steps[0].indices)
            seen += here
        assert sorted(seen) == list(range(1500))
        assert all(len(step.batches) == batches_per_step for step in ranks[0][:-1])

    @pytest.mark.parametrize(("num_ranks", "least"), [(1, 0.99), (8, 0.97)])
    def test_fill(self, num_ranks, least):
        """Windows are planned on their own, but what fills no pass moves on; the end is split to give all ranks one."""
        pairs = many_pairs(8000)
        ranks = [
            schedule(pairs, num_ranks=num_ranks, rank=rank, batches_per_step=1, plan_window=250 * num_ranks)
            for rank in range(num_ranks)
        ]
        passes = [planned for rank in ranks for step in rank.first_pass() for planned in step.batches]
        assert sum(planned.slots for planned in passes) / (8192 * len(passes)) > least

    def test_passes_are_not_in_the_order_of_size(self):
        """Best-fit-decreasing puts the longest pairs into the first passes; training should not see them first."""
        steps = list(schedule(many_pairs(1000), batches_per_step=1).first_pass())
        slots = [step.batches[0].slots for step in steps]
        assert slots != sorted(slots, reverse=True)

    def test_ranks_have_alike_passes_in_a_step(self):
        pairs = many_pairs(4000)
        ranks = [list(schedule(pairs, num_ranks=4, rank=r, batches_per_step=1).first_pass()) for r in range(4)]
        for steps in list(zip(*ranks, strict=True))[:-8]:  # the last window may hold what was left over
            slots = [step.batches[0].slots for step in steps]
            assert min(slots) > 0.9 * max(slots)

    def test_deterministic_and_shuffled_by_the_seed(self):
        pairs = many_pairs(600)
        a, same, other = (schedule(pairs, batches_per_step=2, seed=seed) for seed in (1, 1, 2))
        assert list(a.epoch(0)) == list(same.epoch(0))
        assert list(a.epoch(0)) != list(a.epoch(1))
        assert list(a.epoch(0)) != list(other.epoch(0))

    def test_total_steps_counts_the_epochs_as_they_are(self):
        pairs = many_pairs(300)
        steps = schedule(pairs, batches_per_step=2, epochs=2.5)
        whole = [len(list(steps.epoch(epoch))) for epoch in range(3)]
        expected = sum(whole[:2]) + -(-whole[2] // 2)
        assert steps.total_steps == expected == len(list(steps))

    def test_100_000_pairs_in_under_a_second(self):
        """A second on two idle cores; the bound leaves room for a busy machine."""
        base = many_pairs(5000)
        random = np.random.default_rng(0)
        pairs = [
            TokenPair(
                pair.prompt_length,
                np.concatenate((head := pair.chosen_ids[: pair.prompt_length] + np.int32(epoch), tail)),
                np.concatenate((head, pair.rejected_ids[pair.prompt_length :])),
                "x",
            )
            for epoch, tail in ((e, random.integers(0, 50_000, 60).astype(np.int32)) for e in range(20))
            for pair in base
        ]
        run, packing = RunOptions(output="", max_steps=1), PackingOptions(batches_per_step=1)
        times = []
        for _ in range(2):
            started = time.process_time()
            steps = list(Schedule(pairs, run, packing).epoch(0))
            times.append(time.process_time() - started)
        assert sum(len(step.indices) for step in steps) == 100_000
        assert min(times) < 2
