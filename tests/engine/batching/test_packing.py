"""Packed rows: nothing lost, nothing split, every scored row sees its own sequence and predicts what comes next."""

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_dpo_engine.attention.plan import Segment, plan_attention
from fused_dpo_engine.batching.packing import PackedBatch, pack
from fused_dpo_engine.batching.padding import IGNORE_INDEX, pad
from fused_dpo_engine.data.pairs import TokenPair
from tests.engine.support.toys import any_pairs, make_pairs


def seen_by(batch: PackedBatch, row: int) -> list[int]:
    """Rows that a row of the packed batch attends to, by the segments."""
    for segment in batch.attention.segments:
        if segment.start <= row < segment.stop:
            first = batch.attention.segments[segment.trunk].start
            return [*range(first, first + segment.shared), *range(segment.start, row + 1)]
    raise AssertionError(f"row {row} is in no segment")


def check(batch: PackedBatch, pairs: list[TokenPair]) -> None:
    """Every scored row sees its sequence up to itself, at the right positions, and predicts the next token."""
    tokens, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    rows, targets, offsets = batch.scored_rows.tolist(), batch.targets.tolist(), batch.cu_scored.tolist()
    assert offsets[0] == 0
    assert offsets[-1] == len(rows) == len(targets)
    for place, index in enumerate(batch.pair_indices):
        pair = pairs[index]
        for side, (ids, scored_positions) in enumerate(pair.sides):
            scored = slice(offsets[2 * place + side], offsets[2 * place + side + 1])
            assert targets[scored] == ids[scored_positions].tolist()
            for at, row in zip(scored_positions.tolist(), rows[scored], strict=True):
                seen = seen_by(batch, row)
                assert [tokens[i] for i in seen] == ids[:at].tolist()
                assert [positions[i] for i in seen] == list(range(at))
    assert batch.chosen_lengths.tolist() == [pairs[i].chosen_length for i in batch.pair_indices]
    assert batch.rejected_lengths.tolist() == [pairs[i].rejected_length for i in batch.pair_indices]
    assert batch.scored_lengths[0::2] == batch.chosen_lengths.tolist()
    assert batch.scored_lengths[1::2] == batch.rejected_lengths.tolist()
    assert batch.num_tokens == sum(pairs[i].num_tokens for i in batch.pair_indices)


def check_offsets(batch: PackedBatch) -> None:
    """The offsets and the gathered keys say the same as the segments."""
    plan, length = batch.attention, batch.num_slots
    keys = list(range(length)) if plan.kv_index is None else plan.kv_index.tolist()
    cu_q, cu_k = plan.cu_q.tolist(), plan.cu_k.tolist()
    assert (cu_q[0], cu_q[-1], cu_k[0], cu_k[-1]) == (0, length, 0, len(keys))
    assert [(s.start, s.stop) for s in plan.segments] == list(pairwise(cu_q))
    for n, segment in enumerate(plan.segments):
        assert segment.stop > segment.start
        assert keys[cu_k[n] : cu_k[n + 1]] == seen_by(batch, segment.stop - 1)
    assert plan.max_q == int(plan.cu_q.diff().max())
    assert plan.max_k == int(plan.cu_k.diff().max())
    assert (plan.kv_index is None) == (not any(s.shared for s in plan.segments))


class TestPack:
    @pytest.mark.parametrize("share", [True, False])
    @settings(deadline=None)
    @given(pairs=any_pairs(), order=st.randoms(use_true_random=False))
    def test_every_scored_row_sees_its_own_sequence(self, share, pairs, order):
        indices = order.sample(range(len(pairs)), order.randint(1, len(pairs)))
        batch = pack(pairs, indices, share=share)
        assert batch.pair_indices == indices
        check(batch, pairs)
        check_offsets(batch)
        if not share:
            assert batch.num_slots == batch.num_tokens
        assert batch.num_padding == 0

    def test_a_wrong_row_would_show(self):
        """Negative control of `check`."""
        pairs = make_pairs((3, 4, 2), (2, 2, 2))
        batch = pack(pairs, [0, 1])
        trunk = batch.attention.segments[2]
        mistakes: dict[str, Any] = {
            "scored_rows": batch.scored_rows + 1,
            "position_ids": torch.arange(batch.num_slots)[None],
            "targets": batch.targets.flip(0),
            "attention": plan_attention([*batch.attention.segments[:3], trunk._replace(trunk=0, shared=2)]),
        }
        for name, value in mistakes.items():
            with pytest.raises((AssertionError, IndexError)):
                check(dataclasses.replace(batch, **{name: value}), pairs)

    def test_by_hand(self):
        pair = TokenPair(2, np.array([7, 8, 9], np.int32), np.array([7, 8, 5, 6], np.int32), "x:1")
        batch = pack([pair], [0])
        assert batch.input_ids.tolist() == [[7, 8, 9, 5, 6]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3]]
        assert batch.scored_rows.tolist() == [1, 1, 3]  # the row of token 8 predicts 9, and 5 in the other sequence
        assert batch.targets.tolist() == [9, 5, 6]
        assert batch.cu_scored.tolist() == [0, 1, 3]
        plan = batch.attention
        assert plan.segments == (Segment(0, 3, 0, 0), Segment(3, 5, 0, 2))
        assert plan.kv_index is not None
        assert plan.kv_index.tolist() == [0, 1, 2, 0, 1, 3, 4]
        assert (plan.cu_q.tolist(), plan.cu_k.tolist(), plan.max_q, plan.max_k) == ([0, 3, 5], [0, 3, 7], 3, 4)
        assert (batch.num_slots, batch.num_tokens) == (5, 7)

    def test_dtypes(self):
        batch = pack(make_pairs((3, 2, 4)), [0])
        assert batch.attention.kv_index is not None
        for tensor in (batch.input_ids, batch.position_ids, batch.scored_rows, batch.targets, batch.attention.kv_index):
            assert tensor.dtype == torch.int64
        for tensor in (batch.cu_scored, batch.attention.cu_q, batch.attention.cu_k):
            assert tensor.dtype == torch.int32

    @pytest.mark.parametrize("build", [pack, pad])
    def test_to_moves_every_tensor_and_keeps_the_rest(self, build):
        batch: Any = build(make_pairs((3, 2, 4), (1, 1, 1)), [1, 0])
        away, back = batch.to(torch.device("meta")), batch.to(torch.device("cpu"))
        for field in dataclasses.fields(batch):
            value = getattr(batch, field.name)
            if isinstance(value, Tensor):
                assert getattr(away, field.name).is_meta, field.name
                assert torch.equal(getattr(back, field.name), value)
            elif field.name != "attention":
                assert getattr(away, field.name) == value
        if build is pack:
            assert away.attention.segments == batch.attention.segments
            for name in ("cu_q", "cu_k", "kv_index"):
                assert getattr(away.attention, name).is_meta
                assert torch.equal(getattr(back.attention, name), getattr(batch.attention, name))


class TestPad:
    @settings(deadline=None)
    @given(pairs=any_pairs(), order=st.randoms(use_true_random=False))
    def test_rows_are_the_sequences(self, pairs, order):
        indices = order.sample(range(len(pairs)), order.randint(1, len(pairs)))
        batch = pad(pairs, indices)
        sequences = [side for i in indices for side in pairs[i].sides]
        width = max(len(ids) for ids, _ in sequences)
        assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape == (len(sequences), width)
        for row, (ids, scored) in enumerate(sequences):
            left, kept = width - len(ids), set(scored.tolist())
            assert batch.input_ids[row, : len(ids)].tolist() == ids.tolist()
            assert batch.attention_mask[row].tolist() == [1] * len(ids) + [0] * left
            expected = [int(token) if at in kept else IGNORE_INDEX for at, token in enumerate(ids)]
            assert batch.labels[row].tolist() == expected + [IGNORE_INDEX] * left
        assert batch.num_slots == batch.num_tokens + batch.num_padding == len(sequences) * width
        assert batch.chosen_lengths.tolist() == [pairs[i].chosen_length for i in indices]
        assert batch.rejected_lengths.tolist() == [pairs[i].rejected_length for i in indices]
