"""A model that attends through `fused_dpo` is the same model where it is called without a plan."""

import pytest
import torch
from torch import Tensor, nn

from fused_dpo_engine.attention.call import AttentionCall
from fused_dpo_engine.attention.interface import mask_beside_plan, packed_attention, packed_call
from fused_dpo_engine.attention.plan import Segment, plan_attention
from fused_dpo_engine.attention.segments import masked_attention
from tests.engine.support.toys import FAMILIES, VOCAB, tiny_model

LENGTHS = (9, 4, 7)


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Three sequences of random tokens, padded on one side."""
    ids = torch.randint(1, VOCAB, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, -length:] = 1
    if side == "right":
        mask = mask.flip(1)
    return ids * mask, mask


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_not_seen(family, side):
    """Logits and gradients are those of the sequences one by one, by the model's own eager attention."""
    ids, mask = padded(side)
    ours, alone = tiny_model(family), tiny_model(family, attention="eager")
    got = ours(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits[mask.bool()]
    each = [alone(input_ids=ids[row, mask[row] > 0][None], use_cache=False).logits[0] for row in range(len(ids))]
    expected = torch.cat(each)
    # In float64, but eager attention and RMSNorm go through fp32 inside the models.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    got.square().mean().backward()
    expected.square().mean().backward()
    for mine, true in zip(ours.parameters(), alone.parameters(), strict=True):
        if true.grad is not None and mine.grad is not None:
            # Of a mean over all logits, so as much smaller than theirs; 8e-8 measured.
            torch.testing.assert_close(mine.grad, true.grad, rtol=1e-5, atol=2e-7)
        assert (true.grad is None) == (mine.grad is None)


def test_control_a_dropped_mask_shows():
    ids, mask = padded("left")
    model = tiny_model()
    with torch.no_grad():
        right, wrong = (model(input_ids=ids, attention_mask=m, use_cache=False).logits for m in (mask, None))
    assert (right - wrong)[mask.bool()].abs().max() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache(family):
    """What is written after padded prompts is what is written after each alone, without padding or cache."""
    ids, mask = padded("left")
    ours, alone = tiny_model(family), tiny_model(family, attention="eager")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = ours.generate(input_ids=ids, attention_mask=mask, **settings)
    for row, kept in zip(written, mask.bool(), strict=True):
        prompt = row[: ids.shape[1]][kept]
        expected = alone.generate(input_ids=prompt[None], use_cache=False, **settings)
        assert torch.equal(row[ids.shape[1] :], expected[0, len(prompt) :])


def test_no_mask_is_built_in_a_packed_call():
    shape = {"batch_size": 1, "q_length": 4, "kv_length": 4, "allow_is_causal_skip": False}
    outside = mask_beside_plan(**shape)
    with packed_call():
        assert mask_beside_plan(**shape) is None
    again = mask_beside_plan(**shape)
    assert outside is not None
    assert again is not None
    assert torch.equal(outside, again)


class TestMaskedAttention:
    @pytest.mark.parametrize("softcap", [None, 1.5])
    @pytest.mark.parametrize("sinks", [False, True])
    def test_a_token_that_sees_nothing_is_a_number(self, softcap, sinks):
        q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
        mask = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
        call = AttentionCall(0.3, softcap=softcap, sinks=torch.randn(2) if sinks else None)
        out = masked_attention(q, k, v, mask[None, None], call, causal=True)
        alone = masked_attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], None, call, causal=True)
        torch.testing.assert_close(out[:, 1:], alone)
        out.sum().backward()
        assert all(bool(tensor.grad.isfinite().all()) for tensor in (q, k, v) if tensor.grad is not None)

    @pytest.mark.parametrize("softcap", [None, 1.5])
    def test_a_mask_of_numbers(self, softcap):
        q, k, v = (torch.randn(2, 2, 4, 8) for _ in range(3))
        seen = torch.rand(2, 1, 4, 4) > 0.4
        seen[..., 0] = True
        numbers = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        call = AttentionCall(0.3, softcap=softcap)
        expected, got = (masked_attention(q, k, v, mask, call, causal=True) for mask in (seen, numbers))
        torch.testing.assert_close(got, expected)

    def test_both_directions(self):
        """A layer of an image tower, say, sees all of its tokens."""
        layer = nn.Module()
        vars(layer)["is_causal"] = False
        q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
        expected = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        torch.testing.assert_close(packed_attention(layer, q, k, v, None)[0], expected)
        causal, _ = packed_attention(layer, q, k, v, None, is_causal=True)
        plan = plan_attention([Segment(0, 4, 0, 0)])
        torch.testing.assert_close(causal, packed_attention(nn.Identity(), q, k, v, None, fused_dpo_plan=plan)[0])
