"""Packed attention against a masked softmax written out, and which models it refuses."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fused_dpo_engine.attention.interface import packed_attention, packed_call
from fused_dpo_engine.attention.models import attention_needs, check_packable, warn_of_lengths
from fused_dpo_engine.attention.plan import AttentionPlan, Segment, plan_attention
from fused_dpo_engine.errors import UnsupportedModelError
from tests.engine.support.toys import FAMILIES, IN_FLOAT32, REFUSED, tiny_config, tiny_model, unshared_plan

PLAN = unshared_plan(0, 5, 6, 17, 20)
SHARED = plan_attention([Segment(0, 8, 0, 0), Segment(8, 9, 0, 7), Segment(9, 13, 0, 2), Segment(13, 20, 3, 0)])
PLANS = {"unshared": PLAN, "shared": SHARED}
LAYER = nn.Identity()
FLOAT64: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}
"""Softmaxes over up to 20 keys and sums of 8 or 20 terms of order 1, in another order."""


def inputs(kv_heads: int = 2, tokens: int = 20, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in float64, with gradients."""

    def tensor(heads: int) -> Tensor:
        return torch.randn(batch, heads, tokens, 8, dtype=torch.float64, requires_grad=True)

    return tensor(4), tensor(kv_heads), tensor(kv_heads)


def masked_softmax(
    q, k, v, plan: AttentionPlan, *, scaling=None, sliding_window=None, softcap=None, s_aux=None
) -> Tensor:
    """Attention over the whole row at once, a dense mask deciding who sees whom."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.zeros(scores.shape[-2:], dtype=torch.bool)
    for start, stop, trunk, shared in plan.segments:
        first = plan.segments[trunk].start
        for i in range(start, stop):
            visible = [*range(first, first + shared), *range(start, i + 1)]
            seen[i, visible if sliding_window is None else visible[-sliding_window:]] = True
    scores = torch.where(seen, scores, -torch.inf)
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)), -1)
    weights = scores.softmax(-1)[..., : seen.shape[1]]
    return torch.einsum("bhij,bhjd->bihd", weights, v)


class TestAgainstMaskedSoftmax:
    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    @pytest.mark.parametrize("sliding_window", [None, 1, 3, 11, 100])
    @pytest.mark.parametrize("softcap", [None, 1.5])
    @pytest.mark.parametrize("scaling", [None, 0.7])
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("with_sinks", [False, True])
    def test_values_and_gradients(self, kv_heads, sliding_window, softcap, scaling, plan, with_sinks):
        tensors = inputs(kv_heads=kv_heads)
        sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_sinks else None
        settings = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "s_aux": sinks}
        got, weights = packed_attention(LAYER, *tensors, None, fused_dpo_plan=PLANS[plan], **settings)
        expected = masked_softmax(*tensors, PLANS[plan], **settings)
        tensors += () if sinks is None else (sinks,)
        assert weights is None
        assert got.shape == (1, 20, 4, 8)
        torch.testing.assert_close(got, expected, **FLOAT64)
        upstream = torch.randn_like(got)
        for mine, true in zip(
            torch.autograd.grad(got, tensors, upstream),
            torch.autograd.grad(expected, tensors, upstream),
            strict=True,
        ):
            torch.testing.assert_close(mine, true, **FLOAT64)

    @pytest.mark.parametrize("softcap", [None, 1.5])
    def test_values_of_another_width(self, softcap):
        """As in multi-head latent attention."""
        q, k, v = inputs()
        v = torch.cat((v, v[..., :3]), -1)
        got, _ = packed_attention(LAYER, q, k, v, None, softcap=softcap, fused_dpo_plan=PLAN)
        torch.testing.assert_close(got, masked_softmax(q, k, v, PLAN, softcap=softcap))

    @pytest.mark.parametrize("plan", [PLAN, None])
    def test_the_output_can_be_viewed(self, plan):
        """Models such as JetMoE and AFMoE take `view` to it, as every function of transformers' own allows."""
        got, _ = packed_attention(LAYER, *inputs(), None, fused_dpo_plan=plan)
        assert got.view(1, 20, 32).shape == (1, 20, 32)

    @pytest.mark.parametrize("sliding_window", [None, 6])
    def test_without_a_plan_every_row_is_one_segment(self, sliding_window):
        tensors = inputs(batch=3)
        got, _ = packed_attention(LAYER, *tensors, None, sliding_window=sliding_window)
        torch.testing.assert_close(got, masked_softmax(*tensors, unshared_plan(0, 20), sliding_window=sliding_window))

    def test_the_plan_matters(self):
        tensors = inputs()
        packed, _ = packed_attention(LAYER, *tensors, None, fused_dpo_plan=PLAN)
        whole, _ = packed_attention(LAYER, *tensors, None)
        torch.testing.assert_close(packed[:, :5], whole[:, :5])  # the first segment sees the same either way
        assert (packed - whole)[:, 5:].abs().amax((0, 2, 3)).min() > 1e-3  # every later token does not

    def test_a_branch_sees_what_it_shares(self):
        """Negative control of the plan's shared rows: with another trunk, or one row less, the result is another."""
        tensors = inputs()
        expected, _ = packed_attention(LAYER, *tensors, None, fused_dpo_plan=SHARED)
        for at, change in ((1, {"shared": 6}), (2, {"trunk": 1, "shared": 1}), (2, {"shared": 0})):
            segments = list(SHARED.segments)
            segments[at] = segments[at]._replace(**change)
            got, _ = packed_attention(LAYER, *tensors, None, fused_dpo_plan=plan_attention(segments))
            start, stop = segments[at][:2]
            assert (got - expected)[:, start:stop].abs().amax((0, 2, 3)).min() > 1e-3
            others = torch.arange(20)[(torch.arange(20) < start) | (torch.arange(20) >= stop)]
            torch.testing.assert_close(got[:, others], expected[:, others])

    def test_a_segment_keeps_its_bits_wherever_it_stands(self):
        q, k, v = (t.detach().float() for t in inputs())
        packed, _ = packed_attention(LAYER, q, k, v, None, fused_dpo_plan=PLAN)
        for start, stop, *_ in PLAN.segments:
            alone, _ = packed_attention(LAYER, *(t[:, :, start:stop] for t in (q, k, v)), attention_mask=None)
            assert torch.equal(packed[:, start:stop], alone)

    def test_dropout_is_not_applied(self):
        tensors = inputs()
        plain, _ = packed_attention(LAYER, *tensors, None, fused_dpo_plan=PLAN)
        dropped, _ = packed_attention(LAYER, *tensors, None, dropout=0.9, fused_dpo_plan=PLAN)
        assert torch.equal(plain, dropped)

    @pytest.mark.parametrize("softcap", [None, 1.5])
    def test_mixed_precision(self, softcap):
        """Autocast may hand over fp32 queries and keys beside bf16 values; the output has the values' dtype."""
        q, k, v = (t.detach().float() for t in inputs())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, _ = packed_attention(LAYER, q, k, v.bfloat16(), None, softcap=softcap, fused_dpo_plan=PLAN)
        assert got.dtype == torch.bfloat16
        expected = masked_softmax(q, k, v.bfloat16().float(), PLAN, softcap=softcap)
        torch.testing.assert_close(got.float(), expected, rtol=2**-8, atol=1e-5)  # rounded once, on the way out


class TestRefusals:
    def test_a_mask(self):
        with pytest.raises(ValueError, match=r"attention_mask=None, within packed_call"):
            packed_attention(LAYER, *inputs(), torch.zeros(1, 1, 20, 20), fused_dpo_plan=PLAN)

    def test_attention_in_both_directions(self):
        layer = nn.Module()
        vars(layer)["is_causal"] = False
        with pytest.raises(UnsupportedModelError, match="both directions"):
            packed_attention(layer, *inputs(), None, fused_dpo_plan=PLAN)

    @pytest.mark.parametrize("tokens", [19, 21])
    def test_a_plan_for_another_row(self, tokens):
        with pytest.raises(ValueError, match=f"the plan covers one row of 20 tokens, the batch has 1 of {tokens}"):
            packed_attention(LAYER, *inputs(tokens=tokens), None, fused_dpo_plan=PLAN)

    def test_a_plan_for_several_rows(self):
        with pytest.raises(ValueError, match="the plan covers one row of 20 tokens, the batch has 2 of 20"):
            packed_attention(LAYER, *inputs(batch=2), None, fused_dpo_plan=PLAN)


def build(family: str, **changes: Any) -> Any:
    """Without memory for weights: the check reads class and configuration."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family, **changes), attn_implementation="eager")


def with_rope(family: str, rope: dict[str, Any] | None) -> Any:
    """A stand-in for a model: what the check reads of rotary embeddings is all in the configuration."""
    config = tiny_config(family, **({} if rope is None else {"rope_parameters": rope}))
    return SimpleNamespace(config=config, _supports_attention_backend=True)


LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": LONGROPE,
}


class TestCheckPackable:
    @pytest.mark.parametrize("family", [*FAMILIES, *IN_FLOAT32])
    def test_accepts(self, family):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = build(family)
            check_packable(type(model), model.config)
            warn_of_lengths(model.config)

    @pytest.mark.parametrize("family", REFUSED)
    def test_refuses(self, family):
        model = build(family)
        name = type(model).__name__
        with pytest.raises(UnsupportedModelError, match=f"{name} .*packed sequences would see each other"):
            check_packable(type(model), model.config)

    @pytest.mark.parametrize("kind", ["chunked_attention", "linear_attention", "conv"])
    def test_names_the_layers_it_refuses(self, kind):
        config = SimpleNamespace(layer_types=["full_attention", kind])
        config.get_text_config = lambda: config
        cls = type("Model", (), {"_supports_attention_backend": True})
        with pytest.raises(UnsupportedModelError, match=f"Model has layers of type .*{kind}"):
            check_packable(cls, config)

    @pytest.mark.parametrize("kind", ["dynamic", "longrope"])
    def test_warns_where_frequencies_depend_on_the_batch(self, kind):
        model = with_rope("llama", {"rope_type": kind, "rope_theta": 1e4, **ROPE[kind]})
        original = 64 if kind == "longrope" else 128
        message = f"'{kind}' picks its frequencies by the longest sequence.*--max-length {original} keeps"
        with pytest.warns(UserWarning, match=message):
            warn_of_lengths(model.config)

    def test_warns_where_one_kind_of_layer_does(self):
        rope = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        }
        with pytest.warns(UserWarning, match="'dynamic'"):
            warn_of_lengths(with_rope("gemma3_text", rope).config)

    @pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn", None])
    def test_does_not_warn_otherwise(self, kind):
        rope = None if kind is None else {"rope_type": kind, "rope_theta": 1e4, **ROPE[kind]}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_lengths(with_rope("llama", rope).config)


class TestNeeds:
    @pytest.mark.parametrize(
        ("family", "expected"),
        [
            ("llama", {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "value_dim": 8, "window": None}),
            ("mistral", {"window": 8, "softcap": None}),
            ("gemma2", {"window": 8, "softcap": 1.0}),
            ("gemma3_text", {"window": 8}),
            ("gpt_neox", {"num_kv_heads": 4}),
            ("deepseek_v3", {"head_dim": 16, "value_dim": 12}),
            ("gpt_oss", {"sinks": True, "window": 8}),
            ("gpt2", {"num_heads": 4, "head_dim": 8, "sinks": False}),
        ],
    )
    def test_read_from_the_model(self, family, expected):
        needs = attention_needs(build(family))
        assert {name: getattr(needs, name) for name in expected} == expected

    def test_layers_that_differ(self):
        """The widest heads decide, as in Gemma 4, whose full-attention layers are twice as wide."""
        layers = [
            SimpleNamespace(num_attention_heads=4, num_key_value_heads=n, head_dim=d) for n, d in ((4, 8), (2, 16))
        ]
        config = SimpleNamespace(is_heterogeneous=True, per_layer_config=layers)
        config.get_text_config = lambda: config
        model: Any = SimpleNamespace(config=config, named_parameters=lambda: [])
        needs = attention_needs(model)
        assert (needs.num_kv_heads, needs.head_dim, needs.value_dim) == (2, 16, 16)

    def test_a_window_that_no_layer_uses(self):
        assert attention_needs(build("qwen2", sliding_window=8, use_sliding_window=False)).window is None


class TestRopeWarning:
    """What the warning speaks of, shown on a model."""

    def test_dynamic_frequencies_depend_on_the_company(self):
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)
        ids = torch.randint(5, 250, (1, 12))

        def last(length: int) -> Tensor:
            positions = torch.cat((torch.arange(12), torch.arange(length)))[None]
            row = torch.cat((ids, torch.full((1, length), 7)), 1)
            plan = unshared_plan(0, 12, 12 + length)
            with packed_call():
                output = model.model(input_ids=row, position_ids=positions, use_cache=False, fused_dpo_plan=plan)
            return output.last_hidden_state[0, :12]

        assert torch.allclose(last(4), last(16))
        assert (last(4) - last(40)).abs().max() > 1e-3
