"""The set-up test: passes on what works, and catches what is silent everywhere else."""

from typing import Any

import pytest
import torch
from torch import nn

from fused_dpo_engine.attention.interface import ATTENTION_NAME, packed_attention
from fused_dpo_engine.batching.packing import pack
from fused_dpo_engine.config.options import LoraOptions, ModelOptions, PackingOptions
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.build import build_policy
from fused_dpo_engine.model.parity import pairs_to_test, self_test
from fused_dpo_engine.model.policy import Policy
from tests.engine.support.policies import CPU, PAIRS, another_prefix, policy_of
from tests.engine.support.toys import FAMILIES, IN_FLOAT32, REFUSED, make_pairs, save_folder, set_attention, tiny_model

LAYOUTS: list[dict[str, Any]] = [{}, {"prefix_sharing": False}]


def blind_attention(*tensors, fused_dpo_plan=None, **settings):
    """Attention of a model that loses the plan on its way."""
    return packed_attention(*tensors, **settings)


def run(policy: Policy, **layout: Any) -> None:
    self_test(policy, PAIRS, PackingOptions(**layout))


class TestSelfTest:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_passes(self, family, layout):
        model = tiny_model(family, dtype=torch.float32, scale=3.0)
        run(policy_of(model), **layout)
        assert model.config._attn_implementation == ATTENTION_NAME

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_passes_in_bf16(self, layout):
        run(Policy(tiny_model(dtype=torch.float32, scale=3.0), torch.bfloat16), **layout)

    @pytest.mark.parametrize("family", IN_FLOAT32)
    def test_passes_in_float32_alone(self, family):
        run(policy_of(tiny_model(family, dtype=torch.float32)))

    def test_passes_padded(self):
        run(policy_of(tiny_model(attention="sdpa", dtype=torch.float32)), packing=False)

    @pytest.mark.parametrize(
        ("dtype", "ld_alpha"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 0.5)]
    )
    def test_catches_attention_that_ignores_the_plan(self, monkeypatch, dtype, ld_alpha):
        set_attention(monkeypatch, blind_attention)
        policy = Policy(tiny_model(dtype=torch.float32, scale=3.0), dtype, ld_alpha=ld_alpha)
        with pytest.raises(UserError, match=r"LlamaForCausalLM does not score packed .*is not supported"):
            run(policy)

    def test_catches_an_unknown_factor_on_the_logits(self, monkeypatch):
        model = tiny_model(dtype=torch.float32)
        forward = model.forward

        def scaled(*arguments, **settings):
            output = forward(*arguments, **settings)
            output.logits = output.logits * 1.05
            return output

        monkeypatch.setattr(model, "forward", scaled)
        with pytest.raises(UserError, match="the head of LlamaForCausalLM is not read as the model applies it"):
            run(policy_of(model))

    def test_catches_positions_of_the_models_own(self, monkeypatch):
        """As in models that number the tokens themselves and ignore position_ids."""
        model = tiny_model("gpt2", dtype=torch.float32)
        forward = model.transformer.forward
        monkeypatch.setattr(
            model.transformer, "forward", lambda *a, position_ids=None, **settings: forward(*a, **settings)
        )
        with pytest.raises(UserError, match="is not supported"):
            run(policy_of(model))

    def test_catches_a_model_that_gives_no_numbers(self):
        model = tiny_model(dtype=torch.float32)
        nn.init.constant_(model.model.norm.weight, torch.nan)
        with pytest.raises(UserError, match=r"own log-prob of pairs\.jsonl:1 is not finite.*weights may be damaged"):
            run(policy_of(model))

    def test_leaves_no_gradient(self):
        model = tiny_model(dtype=torch.float32)
        run(policy_of(model))
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_catches_the_prefix_of_another_pair(self, monkeypatch):
        monkeypatch.setattr(
            "fused_dpo_engine.batching.planning.pack",
            lambda *arguments, share: another_prefix(pack(*arguments, share=share)),
        )
        with pytest.raises(UserError, match="does not score packed"):
            run(policy_of(tiny_model(dtype=torch.float32)))

    def test_catches_a_window_that_attention_leaves_out(self, monkeypatch):
        """The model's own attention is on the other side: what ours gets wrong in every layout shows too."""

        def windowless(*tensors, sliding_window=None, **settings):
            return packed_attention(*tensors, **settings)

        set_attention(monkeypatch, windowless)
        with pytest.raises(UserError, match="does not score packed"):
            run(policy_of(tiny_model("mistral", dtype=torch.float32)))

    def test_catches_a_padded_model_that_ignores_its_mask(self, monkeypatch):
        model = tiny_model(attention="sdpa", dtype=torch.float32)
        forward = model.model.forward

        def shifted(*a, input_ids, **settings):
            return forward(*a, input_ids=input_ids.flip(0), **settings)

        monkeypatch.setattr(model.model, "forward", shifted)
        with pytest.raises(UserError, match="does not score padded"):
            run(policy_of(model), packing=False)


class TestPairsToTest:
    PAIRS = make_pairs((5, 9, 9), (1, 1, 1), (40, 20, 20), (5, 8, 8), (9, 9, 9), (2, 90, 9))

    def test_short_ones_and_the_median_with_enough_tokens(self):
        assert pairs_to_test(self.PAIRS, PackingOptions()) == [3, 0, 5]

    def test_what_fits(self):
        assert pairs_to_test(self.PAIRS, PackingOptions(tokens_per_batch=30)) == [3]
        assert pairs_to_test(self.PAIRS, PackingOptions(tokens_per_batch=60)) == [3, 0]

    def test_fewer_than_three(self):
        assert pairs_to_test(self.PAIRS[1:2], PackingOptions()) == [0]


class TestRefusals:
    @pytest.mark.parametrize("family", REFUSED)
    def test_what_cannot_be_packed_is_the_users_to_know(self, tmp_path, family):
        """A message, not a traceback, from loading or from the self-test."""
        folder = save_folder(tmp_path / family, family, tokenizer=None)
        with pytest.raises(UserError) as caught:
            run(build_policy(ModelOptions(str(folder), dtype="float32"), LoraOptions(), CPU))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("family", ["bloom", "falcon", "gpt_neo", "mamba"])
    def test_the_way_out_works(self, tmp_path, family):
        """Refused packed, they train on padded batches."""
        folder = save_folder(tmp_path / family, family, tokenizer=None)
        policy = build_policy(ModelOptions(str(folder), dtype="float32"), LoraOptions(), CPU, packing=False)
        run(policy, packing=False)
