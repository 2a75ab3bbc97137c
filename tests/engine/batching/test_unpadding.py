"""Batches of other trainers in one row: every token keeps its place, its position, its target and what it may see."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from fused_dpo_engine.batching.padding import IGNORE_INDEX
from fused_dpo_engine.batching.unpadding import UnpaddedBatch, repack, unpad

tokens = st.lists(st.integers(1, 2), min_size=0, max_size=6)
sequences = st.lists(
    st.tuples(tokens, st.lists(st.booleans(), min_size=6, max_size=6), st.booleans()), min_size=1, max_size=5
)
"""Tokens of two kinds, so that prompts are equal and sequences extend each other; which are scored; padding's side."""


def padded(drawn: list[tuple[list[int], list[bool], bool]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and labels [N, 7]."""
    ids, mask, labels = (torch.full((len(drawn), 7), fill) for fill in (0, 0, IGNORE_INDEX))
    for row, (given_ids, wanted, left) in enumerate(drawn):
        start = 7 - len(given_ids) if left else 0
        for offset, token in enumerate(given_ids):
            ids[row, start + offset], mask[row, start + offset] = token, 1
            if wanted[offset]:
                labels[row, start + offset] = token
    return ids, mask, labels


def seen_by(batch: UnpaddedBatch, row: int) -> list[int]:
    """Rows that a row attends to, in the order of their positions."""
    for start, stop, trunk, shared in batch.attention.segments:
        if start <= row < stop:
            first = batch.attention.segments[trunk].start
            return [*range(first, first + shared), *range(start, row + 1)]
    raise AssertionError(row)


def check(batch: UnpaddedBatch, ids: Tensor, mask: Tensor, labels: Tensor) -> None:
    """Every token of the batch sees the tokens before it, and what is scored is the label's token."""
    flat_ids, rows = batch.input_ids[0], batch.row_of_slot.view(ids.shape)
    expected = []
    for number in range(len(ids)):
        slots = mask[number].nonzero()[:, 0].tolist()
        for position, slot in enumerate(slots):
            row = int(rows[number, slot])
            assert flat_ids[seen_by(batch, row)].tolist() == ids[number, slots[: position + 1]].tolist()
            assert int(batch.position_ids[0, row]) == position
            if position and int(labels[number, slot]) != IGNORE_INDEX:
                before = int(rows[number, slots[position - 1]])
                expected.append((number * ids.shape[1] + slot, before, int(labels[number, slot])))
    got = zip(batch.scored_slots.tolist(), batch.scored_rows.tolist(), batch.targets.tolist(), strict=True)
    assert list(got) == expected
    assert int(batch.cu_scored[-1]) == len(expected)
    assert batch.attention.num_rows == len(flat_ids)


@given(sequences, st.booleans())
def test_padded_batches(drawn, share):
    ids, mask, labels = padded(drawn)
    if not mask.any():
        with pytest.raises(ValueError, match="the batch has no tokens"):
            unpad(ids, mask, labels)
        return
    batch = unpad(ids, mask, labels, share=share)
    check(batch, ids, mask, labels)
    if not share:
        assert batch.attention.num_rows == mask.sum()


@given(sequences)
def test_sequences_in_one_row(drawn):
    """The same as from a padded batch; the label of a sequence's first token is not looked at."""
    ids, mask, labels = padded(drawn)
    lengths = [length for length in mask.sum(1).tolist() if length]
    if not lengths:
        return
    expected = unpad(ids, mask, labels)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()[:-1]
    seen = mask.bool()
    got = repack(ids[seen][None], starts, labels[seen][None])
    for name in ("input_ids", "position_ids", "scored_rows", "targets", "cu_scored"):
        assert torch.equal(getattr(got, name), getattr(expected, name))
    assert got.attention.segments == expected.attention.segments


def test_what_is_shared_is_computed_once():
    """A prompt of three; the second answer begins as the first, the fourth sequence is the first again."""
    rows = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7], [2, 2, 3, 8], [1, 2, 3, 4, 5]]
    ids, mask, labels = (torch.full((4, 6), fill) for fill in (0, 0, IGNORE_INDEX))
    for row, each in enumerate(rows):
        ids[row, : len(each)], mask[row, : len(each)] = torch.tensor(each), 1
        labels[row, 3 : len(each)] = ids[row, 3 : len(each)]
    batch = unpad(ids, mask, labels)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 2, 2, 3, 8]]
    check(batch, ids, mask, labels)
    assert unpad(ids, mask, labels, share=False).input_ids.numel() == 20


def test_without_a_mask_all_are_tokens():
    ids = torch.tensor([[1, 2, 3]])
    batch = unpad(ids, None, ids)
    check(batch, ids, torch.ones_like(ids), ids)


class TestRefusals:
    IDS = torch.tensor([[1, 2, 3], [1, 2, 0]])

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"same shape \[N, S\], got \[2, 3\], \[2, 3\] and \[2, 2\]"):
            unpad(self.IDS, None, self.IDS[:, 1:])

    def test_gaps(self):
        with pytest.raises(ValueError, match="gaps within sequence 1"):
            unpad(self.IDS, torch.tensor([[1, 1, 1], [1, 0, 1]]), self.IDS)

    def test_scored_padding(self):
        with pytest.raises(ValueError, match=r"labels\[1, 2\] is scored, but lies in padding"):
            unpad(self.IDS, (self.IDS > 0).long(), self.IDS)

    @pytest.mark.parametrize("starts", [[1], [0, 0], [0, 3], [0, 2, 1], []])
    def test_starts(self, starts):
        with pytest.raises(ValueError, match="sequences must begin at 0 and have tokens"):
            repack(self.IDS[:1], starts, self.IDS[:1])

    def test_one_row(self):
        with pytest.raises(ValueError, match=r"same shape \[1, T\]"):
            repack(self.IDS, [0], self.IDS)
